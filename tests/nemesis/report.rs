//! What is shown of a violation: the events of the calls that it is about, and the faults of that time.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::checker::Violation;
use super::history::{Effect, Event, Step, What};

/// So long before the first of these events, a fault may matter, in microseconds.
const BEFORE: u64 = 2_000_000;

/// The part of a history that shows it, in milliseconds since its beginning.
pub(crate) fn explain(violation: &Violation, events: &[Event]) -> String {
    let origin = events.iter().map(|event| event.at).min().unwrap_or_default();
    let millis = |at: u64| {
        let micros = at.saturating_sub(origin);
        format!("{:>7}.{:03}", micros / 1000, micros % 1000)
    };
    let mut text = format!("{:?}: {}\n", violation.broken, violation.says);
    let mut lines = Vec::new();
    let is_held = |event: &Event| matches!(event.what, What::Of(_, Step::Held));
    for id in &violation.of {
        let mut own: Vec<_> =
            events.iter().filter(|event| matches!(&event.what, What::Of(of, _) if of == id)).collect();
        own.sort_by_key(|event| event.at);
        let held: Vec<_> = own.iter().filter(|event| is_held(event)).map(|event| event.at).collect();
        for event in own {
            let What::Of(_, step) = &event.what else { continue };
            // Of those in between nothing is learnt.
            if !is_held(event) || held.first() == Some(&event.at) || held.last() == Some(&event.at) {
                lines.push((event.at, format!("{} {id} {step}", millis(event.at))));
            }
        }
    }
    let from = lines.iter().map(|(at, _)| *at).min().unwrap_or(u64::MAX).saturating_sub(BEFORE);
    let to = lines.iter().map(|(at, _)| *at).max().unwrap_or(0);
    let mut ends = HashMap::new();
    for event in events {
        if let What::Ended { number, effect } = event.what {
            ends.insert(number, (event.at, effect));
        }
    }
    for event in events {
        let What::Began(fault) = &event.what else { continue };
        let end = ends.get(&fault.number);
        if event.at > to || end.is_some_and(|(end, _)| *end < from) {
            continue;
        }
        let until = end.map_or_else(|| "on".to_owned(), |(at, _)| millis(*at).trim_start().to_owned());
        let of = fault.slot.map(|slot| format!(" of worker {slot}")).unwrap_or_default();
        let name = fault.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
        let effect = end.map_or(fault.effect, |(_, effect)| *effect);
        let frees = if effect == Effect::Frees { ", may free locks" } else { "" };
        lines.push((
            event.at,
            format!("{} fault: {}{of}{name}, until {until}{frees}", millis(event.at), fault.kind),
        ));
    }
    lines.sort();
    for (_, line) in lines {
        writeln!(text, "  {line}").expect("a string takes all");
    }
    text
}
