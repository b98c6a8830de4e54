//! The protocol with one precaution taken out: the judge has to find out. Whoever changes a script so that a replacement
//! here doesn't fit any more has to say what takes the place of what was replaced.

use crate::judge::Rule;
use crate::store::{Server, Sources};
use crate::world::{Breakage, Plan, World};
use crate::{histories, trace};

/// So many histories at most until one breaks a rule.
const MOST: u64 = 10_000;

/// Some history breaks one of these rules.
fn convict(sources: &Sources, plan: Plan<'_>) {
    let server = Server::new(sources);
    let broken = |&seed: &u64| World::new(&server, Plan { seed, ..plan }).run().violation().is_some();
    let found = (0..MOST).find(broken);
    let seed = found.unwrap_or_else(|| panic!("{:?} isn't broken in {MOST} histories", plan.only));
    println!("{}", trace(&server, Plan { seed, ..plan }).lines().next().unwrap_or_default());
}

fn script(file: &str, from: &str, to: &str) -> Sources {
    Sources::real().replace(file, from, to)
}

fn breaks(rule: Rule, file: &str, from: &str, to: &str) {
    convict(&script(file, from, to), Plan { only: &[rule], ..Plan::default() });
}

fn client_breaks(rule: Rule, breakage: Breakage) {
    convict(&Sources::real(), Plan { only: &[rule], breakage: Some(breakage), ..Plan::default() });
}

// The waiting claim.

#[test]
fn what_is_handed_over_counts_from_the_last_question_answered_busy() {
    client_breaks(Rule::Exclusion, Breakage::CountsFromArrival);
    client_breaks(Rule::Exclusion, Breakage::CountsFromLastQuestion);
}

#[test]
fn who_was_handed_it_never_joins_again() {
    let gone = "if not redis.call('ZSCORE', queue, owner) then return {'gone'} end";
    breaks(Rule::Zombie, "claim", gone, &gone.replace("return {'gone'}", "how = 'join'"));
    let joins = "if not holder then return {'gone'} end how = 'join'";
    breaks(Rule::Zombie, "claim", gone, &gone.replace("return {'gone'}", joins));
    client_breaks(Rule::Zombie, Breakage::JoinsAgain);
}

/// Two holders, which is why; it takes longer to find.
#[test]
fn who_joins_again_makes_two_holders() {
    let gone = "if not redis.call('ZSCORE', queue, owner) then return {'gone'} end";
    breaks(Rule::Exclusion, "claim", gone, &gone.replace("return {'gone'}", "how = 'join'"));
}

#[test]
fn who_was_handed_it_is_not_granted_it_again() {
    let gone = "if not redis.call('ZSCORE', queue, owner) then return {'gone'} end";
    breaks(Rule::Zombie, "claim", gone, &gone.replace(" then", " and holder then"));
}

#[test]
fn what_is_handed_over_is_confirmed() {
    client_breaks(Rule::Confirmation, Breakage::NeverConfirms);
}

#[test]
fn asking_changes_nothing_for_the_holder() {
    let mine = "return {'mine'";
    breaks(Rule::Theft, "claim", mine, "redis.call('PEXPIRE', lock, ARGV[4] or ttl) return {'mine'");
    breaks(Rule::Theft, "claim", mine, "redis.call('PEXPIRE', lock, ttl) return {'mine'");
}

#[test]
fn who_finds_itself_the_holder_has_what_is_left() {
    client_breaks(Rule::Exclusion, Breakage::MineIsWhole);
}

// Requests that come after everybody has given them up.

#[test]
fn a_broken_off_claim_is_dead() {
    client_breaks(Rule::Zombie, Breakage::LeavesWithoutTombstone);
    breaks(Rule::Zombie, "leave", "if ARGV[2] ~= '0' then", "if false then");
}

#[test]
fn a_claim_looks_whether_it_is_dead() {
    let free = "redis.call('EXISTS', lock, queue, KEYS[5]) == 0";
    breaks(Rule::Zombie, "claim", free, "redis.call('EXISTS', lock, queue) == 0");
    breaks(Rule::Zombie, "claim", "elseif redis.call('EXISTS', KEYS[5]) == 1 then", "elseif false then");
}

const TRANSFER_LOOKS: &str = " or redis.call('EXISTS', KEYS[5]) == 1";

/// Either is enough: that a transfer looks whether it is dead, and that the old owner is released before the new one
/// leaves. Without both, what comes late gives it to nobody.
#[test]
fn a_transfer_that_nobody_answered_is_undone() {
    let breakage = Some(Breakage::LeavesBeforeRelease);
    let plan = Plan { only: &[Rule::Zombie], breakage, transfers: true, ..Plan::default() };
    convict(&script("transfer", TRANSFER_LOOKS, ""), plan);
}

// Who may do what.

#[test]
fn only_the_owner_releases() {
    breaks(Rule::Exclusion, "release", "if holder ~= owner then", "if not holder then");
}

#[test]
fn only_the_owner_renews() {
    let owner = "if redis.pcall('GET', lock) == owner then";
    breaks(Rule::Exclusion, "renew", owner, "if redis.pcall('GET', lock) then");
    breaks(Rule::Theft, "renew", owner, "if redis.pcall('GET', lock) then");
}

#[test]
fn who_leaves_takes_only_its_own() {
    let own = "if string.sub(redis.call('GET', lock) or '', 1, #attempt) == attempt then";
    breaks(Rule::Exclusion, "leave", own, "if true then");
}

#[test]
fn who_leaves_takes_all_that_it_has() {
    breaks(Rule::Zombie, "leave", "remove(owner)", "");
    let own = "if string.sub(redis.call('GET', lock) or '', 1, #attempt) == attempt then";
    breaks(Rule::Zombie, "leave", own, "if redis.call('GET', lock) == owner then");
}

#[test]
fn what_is_kept_is_kept_from_renewals() {
    let kept = "redis.call('SET', lock, kept, 'PX', keep)";
    breaks(Rule::Kept, "release", kept, "redis.call('PEXPIRE', lock, keep)");
}

// The queue.

#[test]
fn the_silent_are_passed_over() {
    breaks(Rule::Absent, "queue", "if alive and alive >= now then", "if alive then");
}

#[test]
fn the_deaf_are_passed_over() {
    breaks(Rule::Absent, "queue", "heard > 0", "heard >= 0");
}

#[test]
fn nobody_overtakes() {
    let nobody_waits = "redis.call('EXISTS', lock, queue, KEYS[5]) == 0";
    breaks(Rule::Order, "claim", nobody_waits, "redis.call('EXISTS', lock, KEYS[5]) == 0");
    let mine = "if first == nil or first == owner or not hand_over() then";
    breaks(Rule::Order, "claim", mine, "if true then");
    breaks(Rule::Order, "queue", "(last or 0) + 1, owner)", "-(last or 0) - 1, owner)");
}

#[test]
fn the_next_is_told_at_once() {
    breaks(Rule::Order, "release", "  hand_over()", "  redis.call('DEL', lock)");
    breaks(Rule::Order, "leave", "hand_over()", "redis.call('DEL', lock)");
}

#[test]
fn who_is_granted_it_leaves_the_queue() {
    let leaves = "    remove(owner)\n    redis.call('SET', lock, owner, 'PX', ttl)";
    breaks(Rule::Zombie, "claim", leaves, "    redis.call('SET', lock, owner, 'PX', ttl)");
}

/// Who finds the lock free may be the next that listens, and get it by a message.
#[test]
fn who_is_handed_it_by_its_own_question_does_not_line_up() {
    let own = "if redis.call('GET', lock) == owner then return {'busy'";
    breaks(Rule::Zombie, "claim", own, "if false then return {'busy'");
}

#[test]
fn the_dead_leave_the_queue() {
    let dropped = "      return owner, grace, channel\n    end\n    remove(owner)";
    breaks(Rule::Script, "queue", dropped, "      return owner, grace, channel\n    end");
}

#[test]
fn a_queue_of_the_dead_expires() {
    breaks(Rule::Leftovers, "queue", "if redis.call('PTTL', queue) < grace then", "if false then");
    breaks(Rule::Leftovers, "queue", "redis.call('PEXPIRE', waiters, grace)", "");
}

#[test]
fn what_is_handed_over_expires() {
    let expires = "redis.call('SET', lock, owner, 'PX', grace)";
    breaks(Rule::Starvation, "queue", expires, "redis.call('SET', lock, owner)");
    breaks(Rule::Absent, "queue", expires, "redis.call('SET', lock, owner, 'PX', grace * 2)");
}

// The server's clock.

/// With the clock of the server an hour back, locks last an hour too long, as everything in Redis does. What doesn't
/// depend on that has to hold.
const STEP: Plan<'_> = Plan {
    seed: 0,
    only: &[Rule::Exclusion, Rule::Tokens, Rule::Order, Rule::Zombie, Rule::Theft, Rule::Script],
    breakage: None,
    clock_steps_back: true,
    transfers: false,
    trace: false,
};

#[test]
fn a_clock_that_steps_back_makes_no_two_holders() {
    let server = Server::new(&Sources::real());
    for seed in 0..histories() / 4 {
        let world = World::new(&server, Plan { seed, ..STEP }).run();
        assert!(world.violation().is_none(), "{}", trace(&server, Plan { seed, ..STEP }));
    }
}

#[test]
fn tokens_rise_though_the_clock_steps_back() {
    let token = "math.max((tonumber(redis.call('GET', fence) or 0)) + 1, micros)";
    convict(&script("queue", token, "micros"), Plan { only: &[Rule::Tokens], ..STEP });
}

// What no history needs.

/// Each of these is there for the case that another precaution fails, or a history that isn't played here.
#[test]
fn these_are_not_needed_by_themselves() {
    let transfer = script("transfer", TRANSFER_LOOKS, "");
    let shortens = script(
        "renew",
        "if redis.call('PTTL', lock) < ttl then redis.call('PEXPIRE', lock, ttl) end",
        "redis.call('PEXPIRE', lock, ttl)",
    );
    let order = Some(Breakage::LeavesBeforeRelease);
    for (what, sources, breakage) in [
        ("that a transfer looks whether it is dead", transfer, None),
        // All renewals of one owner are for the same time, so the later carried out never ends earlier.
        ("that a renewal never shortens", shortens, None),
        ("that the old owner is released first", Sources::real(), order),
    ] {
        let server = Server::new(&sources);
        for seed in 0..histories() / 10 {
            let plan = Plan { seed, breakage, transfers: true, ..Plan::default() };
            let world = World::new(&server, plan).run();
            assert!(world.violation().is_none(), "needed: {what}\n{}", trace(&server, plan));
        }
    }
}

/// Whoever is found at the head of the queue leaves it in the same script, so nobody sees the time that it writes. (Not so
/// on a node of Redlock, where whoever is woken stays in the queue: it is there for that.)
#[test]
fn the_clamp_changes_no_history() {
    let (with, without) = (
        Server::new(&Sources::real()),
        Server::new(&script("queue", "if alive > now + grace then", "if false then")),
    );
    for seed in 0..histories() / 20 {
        let plan = Plan { seed, ..STEP };
        assert_eq!(trace(&with, plan), trace(&without, plan));
    }
}
