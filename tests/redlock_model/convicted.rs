//! Every rule taken out in turn: the search must find what that does.

use crate::ONCE;
use crate::rules::Rules;
use crate::search;
use crate::world::{Bounds, Violation, World};

/// More states than any of these needs.
const MOST: usize = 2_000_000;

fn convict<const N: usize, const A: usize>(
    start: World<N, A>,
    bounds: &Bounds,
    rules: &Rules,
    of: &[Violation],
) {
    let found = search::all(start, bounds, rules, MOST);
    let trace = found.trace();
    eprintln!("{} states: {trace}", found.states);
    let Some((violation, _)) = found.violation else { panic!("not found in {} states", found.states) };
    assert!(of.contains(&violation), "something else: {trace}");
}

const TOKENS: [Violation; 2] = [Violation::TokenRepeated, Violation::TokenNotHigher];

/// As long as locks don't run out too early, it would do without: who raises in time still owns what it owned.
#[test]
fn raising_without_being_the_owner() {
    let rules = Rules { raise_without_owner_check: true, ..Rules::NONE };
    convict(World::<3, 2>::drifted().with_clocks_that_jump(), &ONCE, &rules, &TOKENS);
}

#[test]
fn counting_raises_of_nodes_that_have_not_granted() {
    let rules = Rules { raise_everywhere: true, raise_without_owner_check: true, ..Rules::NONE };
    convict(World::<3, 2>::drifted(), &ONCE, &rules, &TOKENS);
}

#[test]
fn the_highest_number_without_agreement() {
    let rules = Rules { one_phase: true, ..Rules::NONE };
    convict(World::<3, 2>::drifted(), &ONCE, &rules, &TOKENS);
}

#[test]
fn half_of_the_nodes() {
    let rules = Rules { quorum_too_small: true, ..Rules::NONE };
    convict(World::<3, 2>::new(), &ONCE, &rules, &[Violation::TwoHolders]);
    convict(World::<4, 2>::new(), &ONCE, &rules, &[Violation::TwoHolders]);
}

const ONE_LOSS: Bounds = Bounds { wipes: 1, proposals: &[1], ..ONCE };

/// The lock is given twice; and even if nobody has it any more, the token is.
#[test]
fn a_wiped_node_votes_at_once() {
    let rules = Rules { outsiders_vote: true, ..Rules::NONE };
    convict(World::<3, 2>::new(), &ONE_LOSS, &rules, &[Violation::TwoHolders]);
    let successive = Bounds { rounds: 2, ..ONE_LOSS };
    convict(World::<3, 2>::new(), &successive, &rules, &TOKENS);
}

#[test]
fn admission_without_a_floor() {
    let rules = Rules { no_floor: true, ..Rules::NONE };
    convict(World::<3, 2>::new(), &ONE_LOSS, &rules, &TOKENS);
}

#[test]
fn admission_before_the_quarantine_is_over() {
    let rules = Rules { no_quarantine: true, ..Rules::NONE };
    convict(World::<3, 2>::new(), &ONE_LOSS, &rules, &[Violation::TwoHolders]);
}

/// What a node was admitted above, it must tell as a number that was drawn: what it has forgotten lies below.
#[test]
fn a_floor_that_is_not_passed_on() {
    let rules = Rules { high_without_floor: true, ..Rules::NONE };
    let bounds = Bounds { rounds: 2, wipes: 2, only_when_settled: true, ..ONE_LOSS };
    convict(World::<3, 2>::new(), &bounds, &rules, &TOKENS);
}

/// A token that somebody agrees on in the meantime isn't among them.
#[test]
fn numbers_read_before_the_quarantine_is_over() {
    let rules = Rules { stale_highs: true, ..Rules::NONE };
    convict(World::<3, 2>::drifted(), &ONE_LOSS, &rules, &TOKENS);
}

#[test]
fn an_admission_that_was_meant_for_an_earlier_wait() {
    let rules = Rules { admit_without_number: true, ..Rules::NONE };
    let bounds = Bounds { only_when_settled: true, ..ONE_LOSS };
    convict(World::<3, 2>::bare(), &bounds, &rules, &[Violation::TwoHolders]);
}

/// Not a rule, but where the scheme ends: new nodes are admitted at once, and one of them loses a vote before the others
/// are.
#[test]
fn a_loss_amid_the_first_admission() {
    convict(World::<3, 2>::bare(), &ONE_LOSS, &Rules::NONE, &[Violation::TwoHolders]);
}

#[test]
fn releasing_what_somebody_else_holds() {
    let rules = Rules { release_without_owner_check: true, ..Rules::NONE };
    convict(
        World::<3, 3>::new(),
        &Bounds { rounds: 2, proposals: &[1], ..ONCE },
        &rules,
        &[Violation::TwoHolders],
    );
}

#[test]
fn votes_of_a_round_that_was_given_up() {
    let rules = Rules { late_votes_count: true, ..Rules::NONE };
    convict(
        World::<3, 3>::new(),
        &Bounds { rounds: 2, proposals: &[1], ..ONCE },
        &rules,
        &[Violation::TwoHolders],
    );
}

/// All may be asked to raise, those included that have granted it unheard: they check the owner.
#[test]
fn raising_everywhere_is_no_crime() {
    let rules = Rules { raise_everywhere: true, ..Rules::NONE };
    let found = search::all(World::<3, 2>::drifted(), &ONCE, &rules, MOST);
    assert_eq!(found.violation, None, "{}", found.trace());
    assert!(!found.cut_off && found.held > 0);
}
