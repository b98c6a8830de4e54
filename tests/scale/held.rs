//! Very many locks held at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fencelock::LockProvider;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::measures::{at_most, memory, raise_descriptor_limit};
use crate::stage::{Stage, within};
use crate::waiters::per;

/// How many of them somebody else tries to get.
const TRIED: usize = 50;

/// What holding may cost, and how long that is watched.
pub(crate) struct Size {
    /// So many locks, of which the trial has its name.
    pub(crate) count: usize,
    pub(crate) ttl: Duration,
    /// For so long all are held, which is longer than the TTL.
    pub(crate) time: Duration,
    /// So many are taken at a time.
    pub(crate) at_a_time: usize,
    pub(crate) connections: u64,
    /// Requests within a third of the TTL, in which all have to be renewed once.
    pub(crate) commands: f64,
    /// Keys, rows, blobs, files that may stay.
    pub(crate) entries: usize,
}

/// None is lost, few requests over few connections keep them, and then all are free.
pub(crate) async fn many_held(stage: &Stage, size: &Size) {
    raise_descriptor_limit();
    let count = size.count;
    let ours = stage.counted(size.ttl).await;
    let theirs = stage.direct(size.ttl).await;
    let (before, began, commands) = (memory(), Instant::now(), stage.commands());
    let mut claims = JoinSet::new();
    let permits = Arc::new(Semaphore::new(size.at_a_time));
    for number in 0..count {
        let (lock, permits) = (ours.create_lock(&name(number)), permits.clone());
        claims.spawn(async move {
            let _permit = permits.acquire_owned().await.expect("never closed");
            (number, lock.acquire().await.expect("it is free"))
        });
    }
    let mut held = within("all are held", claims.join_all()).await;
    let (took, for_each) = (began.elapsed(), per(stage.commands() - commands, count));
    held.sort_unstable_by_key(|(number, _)| *number);
    let each = memory().saturating_sub(before) / count;

    let commands = stage.commands();
    sleep(size.time).await;
    let thirds = 3.0 * size.time.as_secs_f64() / size.ttl.as_secs_f64();
    let renewals = per(stage.commands() - commands, 1) / thirds;
    let connections = stage.connections();
    let lost: Vec<_> = held.iter().filter(|(_, guard)| guard.is_lost()).map(|(number, _)| *number).collect();
    let sample = || (0..count).step_by(count / TRIED);
    let mut stolen = Vec::new();
    for number in sample() {
        let lock = theirs.create_lock(&name(number));
        if within("it is tried", lock.try_acquire()).await.expect("the server is there").is_some() {
            stolen.push(number);
        }
    }

    let earlier: Vec<_> = sample().map(|number| held[number].1.fencing_token()).collect();
    let ended = Instant::now();
    let mut releases = JoinSet::new();
    for (number, guard) in held {
        // The others are dropped.
        if number % 2 == 0 {
            let permits = permits.clone();
            releases.spawn(async move {
                let _permit = permits.acquire_owned().await.expect("never closed");
                guard.release().await.map_err(|error| (number, error))
            });
        }
    }
    let refused: Vec<_> =
        within("all are released", releases.join_all()).await.into_iter().filter_map(Result::err).collect();
    within("the provider is closed", ours.close()).await.expect("it is closed");
    let ended = ended.elapsed();
    println!(
        "{}: {count} taken in {took:.1?} with {for_each:.2} commands each, held for {:?} (ttl {:?}) with {renewals:.1} \
         commands in a third of the ttl, over {connections} connections, released in {ended:.1?}; {each} bytes each; \
         {} entries",
        stage.kind.name,
        size.time,
        size.ttl,
        stage.rig.lasting_entries(),
    );
    assert!(lost.is_empty(), "{} are lost: {lost:?}", lost.len());
    assert!(stolen.is_empty(), "somebody else got {stolen:?}");
    assert!(refused.is_empty(), "{} had been lost: {:?}", refused.len(), refused.first());
    assert!(connections <= size.connections, "{connections} connections");
    assert!(renewals <= size.commands, "{renewals:.1} commands in a third of the ttl");
    for (number, earlier) in sample().zip(earlier) {
        let lock = theirs.create_lock(&name(number));
        let guard = within("it is tried", lock.try_acquire()).await.expect("the server is there");
        let token = guard.expect("it was released").fencing_token();
        assert!(token > earlier, "{token} after {earlier}");
    }
    within("the provider is closed", theirs.close()).await.expect("it is closed");
    at_most("entries", size.entries, || stage.rig.lasting_entries()).await;
}

fn name(number: usize) -> String {
    format!("held/{number}")
}
