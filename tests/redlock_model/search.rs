//! All that can happen, breadth first, or some of it, by chance.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use crate::rules::Rules;
use crate::world::{Action, Bounds, Violation, World};

/// Two hashes of 64 bits that have little to do with each other.
#[derive(Default)]
struct Print(u64, u64);

impl Hasher for Print {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.1 =
            (self.1.rotate_left(29) ^ number.wrapping_add(0x2545_f491)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        self.1 ^= self.1 >> 32;
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(number.cast_unsigned() as u64);
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
}

/// What is a hash already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only numbers of 128 bits")
    }

    fn write_u128(&mut self, number: u128) {
        self.0 = u64::try_from(number >> 64).expect("the upper half");
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

fn print_of(value: &impl Hash) -> u128 {
    let mut print = Print::default();
    value.hash(&mut print);
    u128::from(print.finish()) << 64 | u128::from(print.1)
}

#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) states: usize,
    /// The states in which somebody holds the lock.
    pub(crate) held: usize,
    pub(crate) deepest: usize,
    /// There was more.
    pub(crate) cut_off: bool,
    pub(crate) violation: Option<(Violation, Vec<Action>)>,
}

impl Found {
    pub(crate) fn trace(&self) -> String {
        let mut text = String::new();
        if let Some((violation, path)) = &self.violation {
            for action in path {
                let _ = write!(text, "{action:?} ");
            }
            let _ = write!(text, "=> {violation:?}");
        }
        text
    }
}

/// Everything within the bounds, up to so many states.
pub(crate) fn all<const N: usize, const A: usize>(
    start: World<N, A>,
    bounds: &Bounds,
    rules: &Rules,
    most: usize,
) -> Found {
    let mut seen: HashSet<u128, BuildHasherDefault<AsItIs>> = HashSet::default();
    // How each state was come by, in the order in which they were found.
    let mut steps: Vec<(u32, Action)> = vec![(0, Action::Look(0, 0))];
    let mut layer = vec![(start, 0_u32)];
    let mut found = Found { states: 1, held: 0, deepest: 0, cut_off: false, violation: None };
    seen.insert(print_of(&start.sorted()));
    let mut actions = Vec::new();
    while !layer.is_empty() {
        let mut next_layer = Vec::new();
        for (world, index) in layer {
            actions.clear();
            world.actions(bounds, rules, &mut actions);
            for &action in &actions {
                let mut next = world;
                let outcome = next.apply(action, rules).and_then(|()| next.check_rest(rules));
                if let Err(violation) = outcome {
                    found.violation = Some((violation, path(&steps, index, action)));
                    return found;
                }
                if seen.insert(print_of(&next.sorted())) {
                    if found.states >= most {
                        found.cut_off = true;
                        return found;
                    }
                    found.states += 1;
                    found.held += next.holders();
                    let number = u32::try_from(steps.len()).expect("no more than memory holds");
                    steps.push((index, action));
                    next_layer.push((next, number));
                }
            }
        }
        found.deepest += 1;
        layer = next_layer;
    }
    found
}

fn path(steps: &[(u32, Action)], mut index: u32, last: Action) -> Vec<Action> {
    let mut path = vec![last];
    while index != 0 {
        let (before, action) = steps[usize::try_from(index).expect("it was a length")];
        path.push(action);
        index = before;
    }
    path.reverse();
    path
}

/// A generator of numbers that look random (splitmix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ z >> 31) % limit as u64).expect("below a usize")
    }
}

/// One way through, by chance. How many grants there were.
pub(crate) fn walk<const N: usize, const A: usize>(
    mut world: World<N, A>,
    bounds: &Bounds,
    rules: &Rules,
    dice: &mut Dice,
) -> Result<u32, (Violation, Vec<Action>)> {
    let (mut actions, mut path, mut grants, mut last) = (Vec::new(), Vec::new(), 0, 0);
    loop {
        actions.clear();
        world.actions(bounds, rules, &mut actions);
        // What ends things comes seldom, or nothing would ever come about.
        let rare = |action: &Action| {
            matches!(
                action,
                Action::Start(..)
                    | Action::End(_)
                    | Action::Expire(_)
                    | Action::Fail(..)
                    | Action::Restart(_)
                    | Action::Wipe(_)
                    | Action::Look(..)
            )
        };
        let common = actions.iter().filter(|action| !rare(action)).count();
        if common > 0 && dice.below(8) > 0 {
            actions.retain(|action| !rare(action));
        }
        if actions.is_empty() || path.len() > 400 {
            return Ok(grants);
        }
        let action = actions[dice.below(actions.len())];
        path.push(action);
        if let Err(violation) = world.apply(action, rules).and_then(|()| world.check_rest(rules)) {
            return Err((violation, path));
        }
        if world.last() > last {
            (last, grants) = (world.last(), grants + 1);
        }
    }
}
