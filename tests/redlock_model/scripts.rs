//! The model's node against the real scripts: the same requests to both, and the answers compared.

use std::collections::BTreeMap;

use crate::node::{NOBODY, Node, Stand, Vote};
use crate::rules::Rules;
use crate::search::Dice;
use crate::store::{Resp, Server};

/// The scripts keep all of them.
const RULES: Rules = Rules::NONE;

const TTL: i64 = 1000;
const CLAIM: usize = 0;
const RAISE: usize = 1;
const RELEASE: usize = 2;
const ENLIST: usize = 3;
const ADMIT: usize = 4;

/// By the names of the files.
fn real() -> BTreeMap<&'static str, String> {
    [
        ("queue", include_str!("../../src/redis/scripts/queue.lua")),
        ("node", include_str!("../../src/redis/scripts/redlock/node.lua")),
        ("claim", include_str!("../../src/redis/scripts/redlock/claim.lua")),
        ("raise", include_str!("../../src/redis/scripts/redlock/raise.lua")),
        ("release", include_str!("../../src/redis/scripts/release.lua")),
        ("enlist", include_str!("../../src/redis/scripts/redlock/enlist.lua")),
        ("admit", include_str!("../../src/redis/scripts/redlock/admit.lua")),
    ]
    .map(|(name, source)| (name, source.to_owned()))
    .into()
}

/// As `src/redis/script.rs` puts them together.
fn server(files: &BTreeMap<&'static str, String>) -> Server {
    let together = |names: &[&str]| names.iter().map(|name| &*files[name]).collect::<String>();
    Server::of(&[
        together(&["queue", "node", "claim"]),
        together(&["queue", "node", "raise"]),
        together(&["queue", "node", "release"]),
        together(&["enlist"]),
        together(&["admit"]),
    ])
}

fn owner_text(owner: Option<u8>) -> String {
    owner.map_or_else(String::new, |owner| format!("{owner:x}.1"))
}

fn run_text(run: u8) -> String {
    format!("run-{run}")
}

fn int(number: u64) -> Resp {
    Resp::Int(number.try_into().expect("a small number"))
}

fn said(vote: Vote) -> Resp {
    let word = |word: &str| Resp::Bulk(word.to_owned());
    Resp::Array(match vote {
        Vote::Granted(counter) => vec![word("granted"), int(counter)],
        Vote::Busy(NOBODY) => vec![word("busy"), word(""), Resp::Int(-2)],
        Vote::Busy(holder) => vec![word("busy"), Resp::Bulk(owner_text(Some(holder))), Resp::Int(TTL)],
        Vote::Outside => vec![word("outside")],
    })
}

/// One node, both ways.
struct Pair<'a> {
    server: &'a Server,
    node: Node,
    /// The numbers and floors of admissions begin here.
    numbers: u8,
    /// How often which answer was given.
    answers: &'a mut BTreeMap<&'static str, u32>,
}

impl Pair<'_> {
    fn ask(&self, script: usize, args: &[String]) -> Resp {
        let lock = ["lock", "fence", "queue", "waiters", "dead", "node"].map(str::to_owned);
        let keys = if script == ENLIST || script == ADMIT { &lock[5..] } else { &lock };
        self.server.run(script, keys, args).expect("the script runs")
    }

    fn flag(&mut self, what: [&'static str; 2], flag: bool) -> Resp {
        *self.answers.entry(what[usize::from(flag)]).or_default() += 1;
        Resp::Int(flag.into())
    }

    /// One random request. The scripts' answer and the model's, if they differ.
    fn step(&mut self, dice: &mut Dice) -> Option<String> {
        let small = |dice: &mut Dice, limit| u8::try_from(dice.below(limit)).expect("small");
        let (owner, number) = (small(dice, 3), small(dice, 4));
        let token = dice.below(1000) as u64;
        // Seldom the run before.
        let run = self.node.server.saturating_sub(u8::from(dice.below(8) == 0));
        let (run_said, owner_said) = (run_text(run), owner_text(Some(owner)));
        let node = &mut self.node;
        let (what, real, model) = match dice.below(24) {
            0..8 => {
                let from = if dice.below(3) == 0 { Some(small(dice, 3)) } else { None };
                let args = [run_said, owner_said, owner_text(from), TTL.to_string(), token.to_string()];
                let vote = node.claim(run, owner, from, token, &RULES);
                let kind = match vote {
                    Vote::Granted(_) => "granted",
                    Vote::Busy(_) => "busy",
                    Vote::Outside => "outside",
                };
                *self.answers.entry(kind).or_default() += 1;
                (format!("claim {args:?}"), self.ask(CLAIM, &args), said(vote))
            }
            8..12 => {
                let args = [run_said, owner_said, token.to_string()];
                let raised = node.raise(run, owner, token, &RULES);
                (
                    format!("raise {args:?}"),
                    self.ask(RAISE, &args),
                    self.flag(["not raised", "raised"], raised),
                )
            }
            12..16 => {
                let args = [owner_said, "0".to_owned()];
                let released = node.release(owner, &RULES);
                let model = self.flag(["not released", "released"], released);
                (format!("release {args:?}"), self.ask(RELEASE, &args), model)
            }
            16..18 => {
                self.numbers += 1;
                let args = [run_said, self.numbers.to_string()];
                let (kind, model) = match node.enlist(run, self.numbers, &RULES) {
                    Stand::Member { high } => ("member", vec![Resp::Bulk("member".to_owned()), int(high)]),
                    Stand::Outside { number, new, high } => {
                        let (word, number) =
                            (Resp::Bulk("outside".to_owned()), Resp::Bulk(number.to_string()));
                        ("waits", vec![word, number, Resp::Int(0), Resp::Int(new.into()), int(high)])
                    }
                };
                *self.answers.entry(kind).or_default() += 1;
                let mut real = self.ask(ENLIST, &args);
                if let Resp::Array(answer) = &mut real {
                    answer.pop(); // the longest TTL isn't part of the model
                }
                (format!("enlist {args:?}"), real, Resp::Array(model))
            }
            18..21 => {
                let number = match node.waits {
                    Some((_, waits)) if dice.below(4) > 0 => waits,
                    _ => self.numbers.saturating_sub(number),
                };
                let args =
                    [run_said, number.to_string(), token.to_string(), "0".to_owned(), "60000".to_owned()];
                let admitted = node.admit(run, number, token, &RULES);
                let model = self.flag(["not admitted", "admitted"], admitted);
                (format!("admit {args:?}"), self.ask(ADMIT, &args), model)
            }
            21 => {
                node.owner = None;
                self.server.store.borrow_mut().delete("lock");
                return None;
            }
            22 => {
                node.counter = 0; // nobody has needed it for seven days
                self.server.store.borrow_mut().delete("fence");
                return None;
            }
            _ => {
                match dice.below(4) {
                    0 => {
                        *node = Node { server: node.server, ..Node::default() };
                        self.server.reset(0);
                    }
                    1 | 2 => node.server += 1,
                    _ => {}
                }
                return None;
            }
        };
        (real != model).then(|| format!("{what}: {real:?}, by the model {model:?}"))
    }
}

/// The first difference in so many sequences.
fn compare(
    files: &BTreeMap<&'static str, String>,
    sequences: u64,
    answers: &mut BTreeMap<&'static str, u32>,
) -> Option<String> {
    let server = server(files);
    (0..sequences).find_map(|seed| {
        server.reset(0);
        let mut pair = Pair { server: &server, node: Node::default(), numbers: 0, answers };
        let mut dice = Dice(seed << 32);
        (0..80).find_map(|step| pair.step(&mut dice).map(|what| format!("seed {seed}, step {step}: {what}")))
    })
}

#[test]
fn the_node_is_what_the_scripts_make() {
    let mut answers = BTreeMap::new();
    let difference = compare(&real(), 300, &mut answers);
    eprintln!("{answers:?}");
    assert_eq!(difference, None);
    let all = ["granted", "busy", "outside", "raised", "not raised", "released", "not released"];
    for kind in all.into_iter().chain(["member", "waits", "admitted", "not admitted"]) {
        assert!(answers.get(kind).is_some_and(|&count| count > 100), "{kind}: {answers:?}");
    }
}

#[test]
fn a_script_that_differs_is_noticed() {
    for (file, from, to) in [
        ("claim", "redis.call('HGET', node, 'run') ~= ARGV[1]", "false"),
        ("claim", ") + 1, proposal", "), proposal"),
        ("claim", "proposal, floor)", "proposal)"),
        ("claim", "proposal, floor)", "floor)"),
        ("claim", "(from ~= '' and from)", "false"),
        ("claim", "note_token(counter)", ""),
        ("raise", " or redis.call('GET', lock) ~= ARGV[2]", ""),
        ("raise", "redis.call('HGET', node, 'run') ~= ARGV[1] or ", ""),
        ("raise", "note_token(token)", ""),
        ("node", "redis.call('HSET', node, 'high', string.format('%.0f', token))", ""),
        ("release", "if holder ~= owner then return 0 end", ""),
        ("enlist", "was[4] ~= run or ", "not was[4] or "),
        ("admit", " or was[6] ~= ARGV[2]", ""),
        ("admit", "was[5] ~= run or ", ""),
        ("admit", "tonumber(was[3] or 0)", "0"),
        ("admit", "tonumber(was[2] or 0) + 1", "0"),
        ("admit", "tonumber(ARGV[3])", "0"),
    ] {
        let mut files = real();
        let source = files.get_mut(file).expect("there is such a file");
        assert_eq!(source.matches(from).count(), 1, "{from:?} has to be in {file}.lua exactly once");
        *source = source.replace(from, to);
        assert!(
            compare(&files, 300, &mut BTreeMap::new()).is_some(),
            "{file}.lua: nobody notices {to:?} for {from:?}"
        );
    }
}
