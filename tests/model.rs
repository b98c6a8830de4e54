//! Random sequences of what users and servers do, on `memory` under tokio's paused clock, judged by a model of a few
//! lines: who holds which lock until when.

mod common;

use std::time::Duration;

use common::ms;
use fencelock::memory::Memory;
use fencelock::{FencingToken, LockGuard, LockOptions, LockProvider, Loss, Provider};
use proptest::prelude::*;

const NAMES: [&str; 2] = ["a", "b"];
const TTL: Duration = ms(1000);

#[derive(Clone, Debug)]
enum Step {
    /// A try by one of two providers, with renewal or without.
    Try {
        name: usize,
        provider: usize,
        renew: bool,
    },
    /// A wait of so many milliseconds at most.
    TryFor {
        name: usize,
        provider: usize,
        millis: u64,
    },
    /// The n-th live guard is released, and the answer awaited.
    Release(usize),
    /// The n-th live guard is dropped.
    Drop(usize),
    /// An acquire that is given up after so many polls.
    Cancel {
        name: usize,
        provider: usize,
        polls: usize,
    },
    Advance(u64),
    /// An administrator takes the lock away.
    Revoke(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (name, provider) = (0..NAMES.len(), 0..2_usize);
    let step = prop_oneof![
        4 => (name.clone(), provider.clone(), any::<bool>())
            .prop_map(|(name, provider, renew)| Step::Try { name, provider, renew }),
        2 => (name.clone(), provider.clone(), 1..1500_u64)
            .prop_map(|(name, provider, millis)| Step::TryFor { name, provider, millis }),
        3 => any::<usize>().prop_map(Step::Release),
        3 => any::<usize>().prop_map(Step::Drop),
        1 => (name.clone(), provider, 0..4_usize)
            .prop_map(|(name, provider, polls)| Step::Cancel { name, provider, polls }),
        3 => (1..1500_u64).prop_map(Step::Advance),
        1 => name.prop_map(Step::Revoke),
    ];
    prop::collection::vec(step, 0..40)
}

/// A grant as the model sees it.
struct Granted {
    guard: LockGuard,
    name: usize,
    /// When it ends by itself; `None`: it is renewed.
    ends: Option<tokio::time::Instant>,
    /// Taken away: its holder learns it at its next renewal.
    revoked: bool,
}

impl Granted {
    /// Whether it keeps others out.
    fn stands(&self) -> bool {
        !self.revoked && self.ends.is_none_or(|ends| tokio::time::Instant::now() < ends)
    }
}

struct World {
    memory: Memory,
    providers: [Provider<Memory>; 2],
    grants: Vec<Granted>,
    last_token: [Option<FencingToken>; NAMES.len()],
}

impl World {
    fn new() -> Self {
        let memory = Memory::new();
        let providers = [(); 2].map(|()| Provider::new(memory.clone()));
        Self { memory, providers, grants: Vec::new(), last_token: [None; NAMES.len()] }
    }

    fn holder(&self, name: usize) -> Option<&Granted> {
        self.grants.iter().find(|grant| grant.name == name && grant.stands())
    }

    /// A guard whose lock was taken away, as long as its own process hasn't noticed, keeps that process out as well.
    fn may_look_busy(&self, name: usize) -> bool {
        self.grants.iter().any(|grant| grant.name == name && grant.revoked && !grant.guard.is_lost())
    }

    fn record(&mut self, name: usize, renew: bool, guard: LockGuard) {
        let token = guard.fencing_token();
        assert!(self.last_token[name].is_none_or(|last| last < token), "the token has not risen");
        self.last_token[name] = Some(token);
        let ends = (!renew).then(|| tokio::time::Instant::now() + TTL);
        self.grants.push(Granted { guard, name, ends, revoked: false });
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Try { name, provider, renew } => {
                let options = LockOptions::new().ttl(TTL).auto_renew(renew);
                let lock = self.providers[provider].create_lock_with(NAMES[name], options);
                let held = self.holder(name).is_some();
                match lock.try_acquire().await.expect("no error can be") {
                    Some(guard) => {
                        assert!(!held, "two holders");
                        self.record(name, renew, guard);
                    }
                    None => assert!(held || self.may_look_busy(name), "busy, but nobody holds it"),
                }
            }
            Step::TryFor { name, provider, millis } => {
                let lock =
                    self.providers[provider].create_lock_with(NAMES[name], LockOptions::new().ttl(TTL));
                let began = tokio::time::Instant::now();
                if let Some(guard) = lock.try_acquire_for(ms(millis)).await.expect("no error can be") {
                    assert!(self.holder(name).is_none(), "two holders");
                    self.record(name, true, guard);
                } else {
                    assert!(began.elapsed() >= ms(millis), "it gave up too early");
                    assert!(self.holder(name).is_some() || self.may_look_busy(name), "nobody holds it");
                    tokio::time::sleep(ms(1)).await; // the place in the queue is given up in the background
                }
            }
            Step::Release(n) if !self.grants.is_empty() => {
                let grant = self.grants.swap_remove(n % self.grants.len());
                let stands = grant.stands();
                let result = grant.guard.release().await;
                assert_eq!(result.is_ok(), stands, "{result:?}");
            }
            Step::Drop(n) if !self.grants.is_empty() => {
                drop(self.grants.swap_remove(n % self.grants.len()));
                tokio::time::sleep(ms(1)).await; // for the other provider: the release is in the background
            }
            Step::Cancel { name, provider, polls } => {
                let lock =
                    self.providers[provider].create_lock_with(NAMES[name], LockOptions::new().ttl(TTL));
                {
                    let mut acquire = std::pin::pin!(lock.acquire());
                    for _ in 0..polls {
                        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
                        if acquire.as_mut().poll(&mut cx).is_ready() {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                }
                tokio::time::sleep(ms(1)).await; // what was begun is taken back in the background
                self.last_token[name] = None; // it may have drawn one that nobody saw; later ones still rise
            }
            Step::Advance(millis) => tokio::time::sleep(ms(millis)).await,
            Step::Revoke(name) => {
                let held = self.holder(name).is_some();
                assert_eq!(self.memory.revoke(NAMES[name]), held);
                for grant in self.grants.iter_mut().filter(|grant| grant.name == name && grant.stands()) {
                    grant.revoked = true;
                }
            }
            Step::Release(_) | Step::Drop(_) => {}
        }
        for grant in &self.grants {
            match grant.ends {
                Some(_) if grant.stands() => assert!(!grant.guard.is_lost()),
                Some(_) => assert!(grant.guard.is_lost() || grant.revoked),
                None if !grant.revoked => assert!(!grant.guard.is_lost(), "lost although it is renewed"),
                None => {}
            }
        }
    }

    /// In the end everything can be had again, and whoever lost a lock knows why.
    async fn end(mut self) {
        tokio::time::sleep(2 * TTL).await;
        for grant in &self.grants {
            let lost = tokio::time::timeout(ms(1), grant.guard.lost()).await.ok();
            match (grant.ends, grant.revoked) {
                // Without renewals a revocation isn't noticed: the deadline comes.
                (Some(_), _) => assert_eq!(lost, Some(Loss::Expired)),
                (None, true) => assert_eq!(lost, Some(Loss::Taken)),
                (None, false) => assert_eq!(lost, None),
            }
        }
        self.grants.clear();
        for name in NAMES {
            for provider in &self.providers {
                let guard = provider.create_lock(name).acquire().await.expect("free in the end");
                guard.release().await.expect("just acquired");
            }
        }
        for provider in &self.providers {
            provider.close().await.expect("closed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_keeps_to_the_model(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let mut world = World::new();
            for step in steps {
                world.step(step).await;
            }
            world.end().await;
        });
    }
}
