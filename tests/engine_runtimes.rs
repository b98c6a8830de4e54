//! A provider outlives the runtimes it is used on: what was under way on one that is gone goes on on the next.

mod common;

use std::sync::{Arc, mpsc};

use common::faulty::{Fault, Faulty, Op};
use common::{ms, runtime, secs};
use fencelock::{LockOptions, LockProvider, Provider};

fn provider(server: &Faulty) -> Arc<Provider<Faulty>> {
    Arc::new(server.provider())
}

#[test]
fn a_guard_dropped_after_its_runtime_is_released_by_the_next() {
    let server = Faulty::default();
    let provider = provider(&server);
    let guard = runtime().block_on(async { provider.create_lock("x").acquire().await.unwrap() });
    drop(guard); // no runtime at all
    runtime().block_on(async {
        // In this process the name is occupied until it is released: the try sees to that, and waits.
        assert!(provider.create_lock("x").try_acquire().await.unwrap().is_some());
    });
    assert!(server.count(Op::Release) >= 1);
}

#[test]
fn a_release_under_way_when_its_runtime_ends_is_done_by_the_next() {
    let server = Faulty::default();
    let provider = provider(&server);
    server.once(Op::Release, Fault::Hang);
    runtime().block_on(async {
        drop(provider.create_lock("x").acquire().await.unwrap());
        while server.count(Op::Release) == 0 {
            tokio::task::yield_now().await;
        }
    });
    runtime().block_on(async {
        assert!(provider.create_lock("x").try_acquire().await.unwrap().is_some());
    });
}

#[test]
fn grants_are_renewed_by_whichever_runtime_is_left() {
    let server = Faulty::default();
    let provider = provider(&server);
    let options = LockOptions::new().ttl(ms(300));
    let first = runtime();
    first.block_on(async { drop(provider.create_lock("a").acquire().await.unwrap()) });
    let second = runtime();
    let guard = second.block_on(async { provider.create_lock_with("x", options).acquire().await.unwrap() });
    drop(first); // the keeper lived here
    second.block_on(async {
        tokio::time::sleep(secs(1)).await;
        assert!(!guard.is_lost());
        assert!(server.count(Op::Renew) >= 3);
    });
}

#[test]
fn a_waiter_outlives_the_runtime_whose_driver_served_it() {
    let server = Faulty::default();
    let held = provider(&server);
    let provider = provider(&server);
    let first = runtime();
    let guard = first.block_on(async {
        let guard = held.create_lock("x").acquire().await.unwrap();
        let waiting = provider.clone();
        tokio::spawn(async move { waiting.create_lock("x").acquire().await });
        while server.calls(Op::Claim).last().is_none_or(|call| !call.waits) {
            tokio::time::sleep(ms(1)).await;
        }
        guard
    });
    let (started, starts) = mpsc::channel();
    let waiter = std::thread::spawn(move || {
        runtime().block_on(async {
            let lock = provider.create_lock("x");
            let acquire = lock.try_acquire_for(secs(20));
            started.send(()).expect("somebody listens");
            acquire.await.unwrap().expect("granted in the end")
        })
    });
    starts.recv().expect("started");
    std::thread::sleep(ms(50)); // so that it queues behind the first one's driver; either way it must be served
    drop(first);
    runtime().block_on(async { guard.release().await.unwrap() });
    drop(waiter.join().expect("the waiter"));
}

/// The driver backs off from an outage when its runtime ends: nothing of it is under way on the server, and the workers
/// live on.
#[test]
fn a_waiter_outlives_the_runtime_whose_driver_was_backing_off() {
    let server = Faulty::default();
    let provider = provider(&server);
    let workers =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
    workers.block_on(async { drop(provider.create_lock("other").acquire().await.unwrap()) });

    server.always(Op::Claim, Fault::Refuse(fencelock::ErrorKind::Unavailable));
    let options = LockOptions::new().retry_for(secs(60));
    let (first, second) =
        (provider.create_lock_with("x", options.clone()), provider.create_lock_with("x", options));
    let doomed = runtime();
    doomed.block_on(async {
        tokio::spawn(async move { first.acquire().await });
        while server.count(Op::Claim) < 8 {
            tokio::time::sleep(ms(1)).await; // its delays have grown
        }
    });
    let waiter = std::thread::spawn(move || runtime().block_on(second.try_acquire_for(secs(20))));
    std::thread::sleep(ms(50)); // so that it queues behind the other; either way it must be served
    drop(doomed);
    server.heal();
    assert!(waiter.join().expect("the waiter").unwrap().is_some(), "it was not served");
}

#[test]
fn a_lock_moves_between_threads_and_runtimes() {
    let server = Faulty::default();
    let provider = provider(&server);
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let provider = provider.clone();
            std::thread::spawn(move || {
                for _ in 0..50 {
                    runtime().block_on(async {
                        let guard = provider.create_lock("x").try_acquire_for(secs(60)).await.unwrap();
                        drop(guard.expect("granted in the end"));
                    });
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("a thread");
    }
}

/// Each thread has a runtime of its own that is only polled while the thread is inside it, as in programs that are not
/// async themselves. Nobody has to wait for a runtime that stands still.
#[test]
fn a_runtime_that_is_alive_but_not_polled_holds_up_nobody_who_is() {
    let server = Faulty::default();
    let provider = provider(&server);
    let idle = runtime();
    // Keeper and releaser live here.
    let (dropped, released) = idle.block_on(async {
        (
            provider.create_lock("d").acquire().await.unwrap(),
            provider.create_lock("r").acquire().await.unwrap(),
        )
    });
    let waiter = std::thread::spawn({
        let provider = provider.clone();
        move || {
            let lock = provider.create_lock("r");
            runtime().block_on(async {
                let guard = lock.try_acquire_for(secs(10)).await.unwrap().expect("served in the end");
                guard.release().await
            })
        }
    });
    std::thread::sleep(ms(100)); // it waits
    server.once(Op::Transfer, Fault::Refuse(fencelock::ErrorKind::Unavailable)); // a driver has to serve it
    idle.block_on(async { released.release().await.unwrap() });
    drop(dropped);
    // Who comes next sees to what `idle` doesn't; who waits is served where it waits.
    for name in ["d", "r"] {
        let lock = provider.create_lock(name);
        assert!(runtime().block_on(lock.try_acquire_for(secs(10))).unwrap().is_some(), "{name}");
    }
    waiter.join().expect("the waiter").expect("released");
}
