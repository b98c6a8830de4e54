//! Histories made by hand, and what the checker has to say of them.

use libtest_mimic::{Failed, Trial};

use super::checker::Broken::{self, Counter, Errors, Exclusion, Finality, Tokens};
use super::checker::{Rules, judge};
use super::history::{Effect, Event, Fault, Id, Step, What};

const RULES: Rules = Rules { ttl: 1000, slack: 10, deadline: true };
const WITHOUT_DEADLINE: Rules = Rules { deadline: false, ..RULES };

/// The calls of two workers, and a second one of the first.
const A: Id = Id { slot: 0, life: 0, task: 0, number: 1 };
const B: Id = Id { slot: 1, life: 0, task: 0, number: 1 };
const C: Id = Id { slot: 0, life: 0, task: 0, number: 2 };

type Test = fn() -> Result<(), Failed>;

#[derive(Clone, Default)]
struct History(Vec<Event>);

impl History {
    fn and(mut self, at: u64, what: What) -> Self {
        self.0.push(Event { at, what });
        self
    }

    fn of(self, at: u64, id: Id, step: Step) -> Self {
        self.and(at, What::Of(id, step))
    }

    fn asked(self, at: u64, id: Id, name: &str) -> Self {
        self.of(at, id, Step::Asked { name: name.to_owned(), how: "acquire".to_owned() })
    }

    /// A grant of `name` that was asked for and got at these times.
    fn grant_of(self, name: &str, id: Id, (asked, got): (u64, u64), token: u64) -> Self {
        self.asked(asked, id, name).of(got, id, Step::Got { token })
    }

    fn grant(self, id: Id, times: (u64, u64), token: u64) -> Self {
        self.grant_of("name", id, times, token)
    }

    fn held(self, at: u64, id: Id) -> Self {
        self.of(at, id, Step::Held)
    }

    fn begins(self, at: u64, slot: Option<u32>, name: Option<&str>, effect: Effect) -> Self {
        let number = self.0.len();
        let fault = Fault { number, kind: "fault".to_owned(), slot, name: name.map(str::to_owned), effect };
        self.and(at, What::Began(fault))
    }

    /// The fault that was the last to begin.
    fn ends(self, at: u64, effect: Effect) -> Self {
        let number = self.0.len() - 1;
        self.and(at, What::Ended { number, effect })
    }

    fn frees(self, (begin, end): (u64, u64)) -> Self {
        self.begins(begin, None, None, Effect::Frees).ends(end, Effect::Frees)
    }

    fn freezes(self, slot: u32, (begin, end): (u64, u64)) -> Self {
        self.begins(begin, Some(slot), None, Effect::Freezes).ends(end, Effect::Freezes)
    }

    fn wrote(self, id: Id, value: u64, current: u64) -> Self {
        self.of(0, id, Step::Wrote { value, current, accepted: true })
    }

    fn counter(self, name: &str, value: u64) -> Self {
        self.and(0, What::Counter { name: name.to_owned(), value })
    }

    fn failed(self, call: &str, kind: &str) -> Self {
        let says = "so".to_owned();
        self.of(0, A, Step::Failed { call: call.to_owned(), kind: kind.to_owned(), says })
    }
}

fn new() -> History {
    History::default()
}

/// A is held for the last time at this moment, and B got at 500.
fn overlap(last_held: u64) -> History {
    new().grant(A, (100, 110), 1).held(200, A).held(last_held, A).grant(B, (120, 500), 2)
}

/// Violations of these promises are found, and no others.
fn expect(rules: Rules, history: &History, broken: &[Broken]) -> Result<(), Failed> {
    let found = judge(&history.0, &rules);
    let kinds: Vec<_> = found.iter().map(|violation| violation.broken).collect();
    if kinds == broken {
        return Ok(());
    }
    let says: Vec<_> = found.iter().map(|violation| &violation.says).collect();
    Err(format!("it should find {broken:?}, and finds {says:?} in {:#?}", history.0).into())
}

fn convicts(history: &History, broken: &[Broken]) -> Result<(), Failed> {
    expect(RULES, history, broken)
}

fn acquits(history: &History) -> Result<(), Failed> {
    expect(RULES, history, &[])
}

pub(crate) fn trials() -> Vec<Trial> {
    let tests: &[(&str, Test)] = &[
        ("nothing_has_happened", || acquits(&new())),
        ("held_after_another_got_it", held_after_another_got_it),
        ("names_are_apart", names_are_apart),
        ("never_held", never_held),
        ("a_late_reply", a_late_reply),
        ("got_before_it_was_asked_for", got_before_it_was_asked_for),
        ("each_of_several_overlaps", each_of_several_overlaps),
        ("order_of_hearing", order_of_hearing),
        ("excused_for_the_ttl", excused_for_the_ttl),
        ("excused_from_the_grant_on", excused_from_the_grant_on),
        ("excused_only_by_what_came_before", excused_only_by_what_came_before),
        ("excused_only_by_what_frees", excused_only_by_what_frees),
        ("excused_by_what_may_be_going_on", excused_by_what_may_be_going_on),
        ("excused_only_for_this_worker", excused_only_for_this_worker),
        ("excused_only_for_this_name", excused_only_for_this_name),
        ("excused_by_any_of_several", excused_by_any_of_several),
        ("frozen_with_a_deadline", frozen_with_a_deadline),
        ("frozen_without_a_deadline", frozen_without_a_deadline),
        ("frozen_partly", frozen_partly),
        ("the_same_token", the_same_token),
        ("a_falling_token", a_falling_token),
        ("a_token_below_the_highest", a_token_below_the_highest),
        ("a_falling_token_of_what_was_freed", a_falling_token_of_what_was_freed),
        ("excused_only_for_those_above", excused_only_for_those_above),
        ("asked_by_another_process", asked_by_another_process),
        ("writes_that_add_one", writes_that_add_one),
        ("a_lost_update", a_lost_update),
        ("a_refused_write", a_refused_write),
        ("a_wrong_value_in_the_end", a_wrong_value_in_the_end),
        ("held_after_the_loss", held_after_the_loss),
        ("released_after_the_loss", released_after_the_loss),
        ("errors_of_an_outage", errors_of_an_outage),
        ("errors_of_a_loss", errors_of_a_loss),
        ("errors_that_never_may_be", errors_that_never_may_be),
        ("trouble", || convicts(&new().and(0, What::Trouble("so".to_owned())), &[Errors])),
    ];
    tests.iter().map(|&(name, test)| Trial::test(format!("checker::{name}"), test)).collect()
}

fn held_after_another_got_it() -> Result<(), Failed> {
    acquits(&overlap(499))?;
    convicts(&overlap(500), &[Exclusion])?;
    convicts(&overlap(501), &[Exclusion])
}

fn names_are_apart() -> Result<(), Failed> {
    let one = new().grant_of("one", A, (100, 110), 1).held(600, A);
    convicts(&one.clone().grant_of("one", B, (120, 500), 2), &[Exclusion])?;
    acquits(&one.clone().grant_of("other", B, (120, 500), 2))?;
    acquits(&one.grant_of("other", B, (120, 500), 1))
}

fn never_held() -> Result<(), Failed> {
    let late = new().grant(A, (100, 900), 1).grant(B, (120, 500), 2);
    acquits(&late)?;
    acquits(&late.of(900, A, Step::Lost))
}

fn a_late_reply() -> Result<(), Failed> {
    // What B had was drawn first, and may have been released since.
    let late = new().grant(A, (100, 110), 2).held(600, A).grant(B, (50, 500), 1);
    acquits(&late)?;
    convicts(&late.held(500, B), &[Exclusion])
}

fn got_before_it_was_asked_for() -> Result<(), Failed> {
    let asked = |at: u64| new().grant(A, (at, 300), 1).held(400, A).grant(B, (50, 200), 2);
    convicts(&asked(201), &[Tokens])?;
    convicts(&asked(200), &[Exclusion])
}

fn each_of_several_overlaps() -> Result<(), Failed> {
    let third = overlap(700).grant(C, (550, 600), 3);
    convicts(&third, &[Exclusion, Exclusion])?;
    convicts(&third.held(650, B), &[Exclusion, Exclusion, Exclusion])
}

fn order_of_hearing() -> Result<(), Failed> {
    let other = new().grant(B, (120, 500), 2).held(550, B);
    let both = |last_held| other.clone().grant(A, (100, 110), 1).held(last_held, A);
    acquits(&both(499))?;
    convicts(&both(510), &[Exclusion])
}

fn excused_for_the_ttl() -> Result<(), Failed> {
    acquits(&overlap(310 + 1000 + 10).frees((300, 310)))?;
    convicts(&overlap(310 + 1000 + 10 + 1).frees((300, 310)), &[Exclusion])
}

fn excused_from_the_grant_on() -> Result<(), Failed> {
    // Whatever goes on: when B got it, it had been freed.
    acquits(&overlap(500 + 1000 + 10).frees((300, 800)))?;
    convicts(&overlap(500 + 1000 + 10 + 1).frees((300, 800)), &[Exclusion])
}

fn excused_only_by_what_came_before() -> Result<(), Failed> {
    acquits(&overlap(600).frees((500, 510)))?;
    convicts(&overlap(600).frees((501, 510)), &[Exclusion])?;
    // It can't have freed what nobody had asked for yet.
    acquits(&overlap(600).frees((50, 100)))?;
    convicts(&overlap(600).frees((50, 99)), &[Exclusion])
}

fn excused_only_by_what_frees() -> Result<(), Failed> {
    let ends = |begin, end| overlap(600).begins(300, None, None, begin).ends(310, end);
    acquits(&ends(Effect::Frees, Effect::Frees))?;
    convicts(&ends(Effect::Nothing, Effect::Nothing), &[Exclusion])?;
    convicts(&ends(Effect::Freezes, Effect::Freezes), &[Exclusion])?;
    // What it did was known afterwards.
    convicts(&ends(Effect::Frees, Effect::Nothing), &[Exclusion])
}

fn excused_by_what_may_be_going_on() -> Result<(), Failed> {
    acquits(&overlap(1510).begins(300, None, None, Effect::Frees))?;
    convicts(&overlap(1511).begins(300, None, None, Effect::Frees), &[Exclusion])?;
    convicts(&overlap(600).begins(300, None, None, Effect::Nothing), &[Exclusion])
}

fn excused_only_for_this_worker() -> Result<(), Failed> {
    let of = |slot| overlap(600).begins(300, Some(slot), None, Effect::Frees).ends(310, Effect::Frees);
    acquits(&of(A.slot))?;
    convicts(&of(B.slot), &[Exclusion])
}

fn excused_only_for_this_name() -> Result<(), Failed> {
    let of = |name| overlap(600).begins(300, None, Some(name), Effect::Frees).ends(310, Effect::Frees);
    acquits(&of("name"))?;
    convicts(&of("other"), &[Exclusion])
}

fn excused_by_any_of_several() -> Result<(), Failed> {
    let first = overlap(1400).frees((200, 210));
    convicts(&first, &[Exclusion])?;
    acquits(&first.clone().frees((390, 400)))?;
    convicts(&first.frees((600, 610)), &[Exclusion])
}

fn frozen_with_a_deadline() -> Result<(), Failed> {
    let frozen = |last_held| overlap(last_held).frees((300, 310)).freezes(A.slot, (400, 900));
    acquits(&frozen(1320))?;
    convicts(&frozen(1321), &[Exclusion])
}

fn frozen_without_a_deadline() -> Result<(), Failed> {
    let frozen = |slot, last_held| overlap(last_held).frees((300, 310)).freezes(slot, (400, 900));
    expect(WITHOUT_DEADLINE, &frozen(A.slot, 1320 + 500), &[])?;
    expect(WITHOUT_DEADLINE, &frozen(A.slot, 1320 + 501), &[Exclusion])?;
    expect(WITHOUT_DEADLINE, &frozen(B.slot, 1320), &[])?;
    expect(WITHOUT_DEADLINE, &frozen(B.slot, 1321), &[Exclusion])?;
    let twice = |last_held| frozen(A.slot, last_held).freezes(A.slot, (1000, 1100));
    expect(WITHOUT_DEADLINE, &twice(1320 + 600), &[])?;
    expect(WITHOUT_DEADLINE, &twice(1320 + 601), &[Exclusion])?;
    // Being frozen alone frees nothing.
    expect(WITHOUT_DEADLINE, &overlap(600).freezes(A.slot, (300, 310)), &[Exclusion])
}

fn frozen_partly() -> Result<(), Failed> {
    let frozen = |last_held, times| overlap(last_held).frees((300, 310)).freezes(A.slot, times);
    // Since the fault began.
    expect(WITHOUT_DEADLINE, &frozen(1320 + 50, (150, 350)), &[])?;
    expect(WITHOUT_DEADLINE, &frozen(1320 + 51, (150, 350)), &[Exclusion])?;
    // Until it was believed to be held for the last time.
    expect(WITHOUT_DEADLINE, &frozen(1321, (1400, 1900)), &[Exclusion])?;
    expect(WITHOUT_DEADLINE, &frozen(1321, (1320, 1900)), &[])?;
    // Other faults aren't counted.
    let stalled = |effect| frozen(1400, (100, 200)).begins(400, Some(A.slot), None, effect).ends(900, effect);
    expect(WITHOUT_DEADLINE, &stalled(Effect::Freezes), &[])?;
    expect(WITHOUT_DEADLINE, &stalled(Effect::Nothing), &[Exclusion])
}

fn the_same_token() -> Result<(), Failed> {
    let one = new().grant(A, (100, 110), 5).held(200, A);
    convicts(&one.clone().grant(B, (300, 310), 5), &[Tokens])?;
    convicts(&one.clone().grant(B, (105, 150), 5), &[Tokens])?;
    acquits(&one.grant(B, (300, 310), 6))
}

fn a_falling_token() -> Result<(), Failed> {
    let second = |asked| new().grant(A, (100, 110), 5).grant(B, (asked, 300), 4);
    acquits(&second(109))?;
    acquits(&second(110))?;
    convicts(&second(111), &[Tokens])
}

fn a_token_below_the_highest() -> Result<(), Failed> {
    // B's was drawn before A's.
    let two = new().grant(A, (100, 110), 9).grant(B, (50, 120), 3);
    acquits(&two)?;
    acquits(&two.clone().grant(C, (200, 210), 10))?;
    convicts(&two.grant(C, (200, 210), 5), &[Tokens])?;
    let rising = new().grant(A, (100, 110), 3).grant(B, (50, 120), 9);
    convicts(&rising.grant(C, (200, 210), 5), &[Tokens])?;
    // C was asked for before anything was got, and came late.
    acquits(&new().grant(A, (20, 100), 5).grant(B, (300, 310), 10).grant(C, (50, 400), 3))
}

/// B is asked for at this time, got with a lower token than A's, and held until that one. Its process had asked at 50.
fn falling(asked: u64, last_held: u64) -> History {
    let cancelled = Id { task: 1, ..B };
    let before = new().asked(50, cancelled, "name").of(60, cancelled, Step::Cancelled);
    let after = before.grant(A, (100, 200), 5).grant(B, (asked, 300), 4);
    if last_held > 300 { after.held(last_held, B) } else { after }
}

fn a_falling_token_of_what_was_freed() -> Result<(), Failed> {
    convicts(&falling(250, 0), &[Tokens])?;
    acquits(&falling(250, 0).frees((70, 80)))?;
    acquits(&falling(250, 80 + 1000 + 10).frees((70, 80)))?;
    convicts(&falling(250, 80 + 1000 + 11).frees((70, 80)), &[Tokens])?;
    acquits(&falling(250, 0).frees((40, 50)))?;
    convicts(&falling(250, 0).frees((40, 49)), &[Tokens])?;
    // It was still held when A was got.
    acquits(&falling(250, 0).frees((200, 210)))?;
    convicts(&falling(250, 0).frees((201, 210)), &[Tokens])?;
    // The same one never is excused.
    let same = new().asked(50, B, "name").grant(A, (100, 110), 5).grant(B, (200, 300), 5);
    convicts(&same.frees((70, 80)), &[Tokens])
}

fn excused_only_for_those_above() -> Result<(), Failed> {
    // The first, not the highest, was got before the fault, and so is the one that tells.
    let first = new().asked(10, B, "name").grant(A, (20, 30), 5).grant(C, (40, 100), 6);
    convicts(&first.clone().frees((50, 60)).grant(B, (200, 300), 4), &[Tokens])?;
    acquits(&first.clone().frees((25, 60)).grant(B, (200, 300), 4))?;
    acquits(&first.frees((50, 60)).grant(B, (200, 300), 7))
}

fn asked_by_another_process() -> Result<(), Failed> {
    let since = |id: Id, name: &str| {
        let fault = new().asked(50, id, name).frees((60, 70));
        fault.grant(A, (100, 110), 1).held(600, A).grant(B, (120, 500), 2)
    };
    acquits(&since(C, "name"))?;
    convicts(&since(C, "other"), &[Exclusion])?;
    convicts(&since(B, "name"), &[Exclusion])?;
    convicts(&since(Id { life: 1, ..C }, "name"), &[Exclusion])
}

fn writes_that_add_one() -> Result<(), Failed> {
    let written = new().asked(0, A, "name").wrote(A, 1, 0).asked(0, B, "name").wrote(B, 2, 1);
    acquits(&written.clone().counter("name", 2))?;
    acquits(&written.asked(0, C, "other").wrote(C, 1, 0).counter("name", 2).counter("other", 1))
}

fn a_lost_update() -> Result<(), Failed> {
    let written = |value| new().asked(0, A, "name").wrote(A, 1, 0).asked(0, B, "name").wrote(B, value, 1);
    convicts(&written(1), &[Counter])?;
    acquits(&written(2))?;
    convicts(&written(3), &[Counter])?;
    convicts(&written(1).counter("name", 1), &[Counter, Counter])
}

fn a_refused_write() -> Result<(), Failed> {
    let refused = Step::Wrote { value: 1, current: 1, accepted: false };
    acquits(&new().asked(0, A, "name").of(0, A, refused).counter("name", 0))
}

fn a_wrong_value_in_the_end() -> Result<(), Failed> {
    let written = |end| new().asked(0, A, "name").wrote(A, 1, 0).counter("name", end);
    convicts(&written(0), &[Counter])?;
    acquits(&written(1))?;
    convicts(&written(2), &[Counter])?;
    convicts(&new().counter("name", 1), &[Counter])?;
    convicts(&new().asked(0, A, "other").wrote(A, 1, 0).counter("name", 1), &[Counter])
}

fn held_after_the_loss() -> Result<(), Failed> {
    let lost = new().grant(A, (100, 110), 1).held(200, A).of(300, A, Step::Lost);
    acquits(&lost)?;
    convicts(&lost.clone().held(400, A), &[Finality])?;
    acquits(&lost.grant(B, (350, 360), 2).held(400, B))
}

fn released_after_the_loss() -> Result<(), Failed> {
    let granted = new().grant(A, (100, 110), 1);
    acquits(&granted.clone().of(400, A, Step::Released))?;
    acquits(&granted.clone().of(300, A, Step::Lost).of(400, A, Step::Dropped))?;
    convicts(&granted.clone().of(300, A, Step::Lost).of(400, A, Step::Released), &[Finality])?;
    convicts(&granted.clone().failed("run", "Lost").of(400, A, Step::Released), &[Finality])?;
    acquits(&granted.failed("release", "Unavailable").of(400, A, Step::Released))
}

fn errors_of_an_outage() -> Result<(), Failed> {
    for kind in ["Unavailable", "Unknown"] {
        for call in ["connect", "acquire", "release", "close"] {
            acquits(&new().failed(call, kind))?;
        }
        // It doesn't ask the server.
        convicts(&new().failed("run", kind), &[Errors])?;
    }
    Ok(())
}

fn errors_of_a_loss() -> Result<(), Failed> {
    acquits(&new().failed("run", "Lost"))?;
    acquits(&new().failed("release", "Lost"))?;
    convicts(&new().failed("acquire", "Lost"), &[Errors])?;
    convicts(&new().failed("close", "Lost"), &[Errors])
}

fn errors_that_never_may_be() -> Result<(), Failed> {
    for kind in ["Config", "Denied", "Unsupported", "Exhausted", "Closed"] {
        for call in ["connect", "acquire", "run", "release", "close"] {
            convicts(&new().failed(call, kind), &[Errors])?;
        }
    }
    Ok(())
}
