//! The life of a grant through every interleaving of guard, keeper and releaser: the crate's own
//! `src/tenure/lifecycle.rs`, compiled against loom's atomics.

/// Where the file under test looks for the crate's own type. A copy, since outside the crate the real one can't be
/// matched exhaustively.
mod guard {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Loss {
        Expired,
        Taken,
        SessionEnded,
        MaxHold,
        Closed,
    }
}

/// The atomics that it runs on here.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, Ordering};
}

#[path = "../src/tenure/lifecycle.rs"]
mod lifecycle;

use guard::Loss;
use lifecycle::{Lifecycle, State};
use loom::sync::Arc;
use loom::thread;

const DEADLINE: i64 = 10;

fn held() -> Arc<Lifecycle> {
    Arc::new(Lifecycle::new(DEADLINE))
}

/// However the holder looks at it while the keeper renews and decides loss: once lost, always lost, for one reason.
#[test]
fn loss_is_final() {
    loom::model(|| {
        let life = held();
        let keeper = thread::spawn({
            let life = life.clone();
            move || {
                life.extend(DEADLINE + 10, DEADLINE - 1); // a renewal that came in time by the keeper's clock
                life.lose(Loss::Taken);
            }
        });
        let (first, _) = life.state(DEADLINE); // by the holder's clock the old deadline has passed
        let (second, _) = life.state(DEADLINE - 1);
        let (third, _) = life.state(DEADLINE);
        if first != State::Held {
            assert_eq!((first, first), (second, third), "it came back to life, or changed its reason");
        }
        keeper.join().expect("the keeper");
        let (last, _) = life.state(0);
        assert!(matches!(last, State::Lost(_)));
        assert_eq!(life.extend(i64::MAX, 0), (last, false), "a renewal revived it");
    });
}

/// Release, loss and expiry race: exactly one of them ends the grant, and everybody learns the same.
#[test]
fn one_end_wins() {
    loom::model(|| {
        let life = held();
        let ends = [
            thread::spawn({
                let life = life.clone();
                move || life.release(DEADLINE - 1)
            }),
            thread::spawn({
                let life = life.clone();
                move || life.lose(Loss::SessionEnded)
            }),
        ];
        let expiry = life.state(DEADLINE);
        let mut all: Vec<_> = ends.into_iter().map(|end| end.join().expect("an end")).collect();
        all.push(expiry);
        assert_eq!(all.iter().filter(|(_, ended)| *ended).count(), 1, "{all:?}");
        let (last, _) = life.state(0);
        assert!(all.iter().all(|(state, _)| *state == last), "{all:?}");
    });
}

/// The guard's drop, the keeper's expiry and the releaser race for the clean-up: one of them gets it.
#[test]
fn one_cleans_up() {
    loom::model(|| {
        let life = held();
        let rivals: Vec<_> = [DEADLINE - 1, DEADLINE]
            .into_iter()
            .map(|now| {
                let life = life.clone();
                thread::spawn(move || {
                    life.release(now);
                    life.claim_cleanup()
                })
            })
            .collect();
        let mut cleaned = usize::from(life.claim_cleanup());
        for rival in rivals {
            cleaned += usize::from(rival.join().expect("a rival"));
        }
        assert_eq!(cleaned, 1);
    });
}

/// Two renewals whose answers arrive in either order leave the later deadline.
#[test]
fn renewals_never_shorten() {
    loom::model(|| {
        let life = held();
        let late = thread::spawn({
            let life = life.clone();
            move || life.extend(DEADLINE + 5, 0)
        });
        life.extend(DEADLINE + 10, 0);
        late.join().expect("the late one");
        assert_eq!(life.deadline(), DEADLINE + 10);
    });
}
