//! The faults, by stream: what is done to workers, to servers, and to the network before each worker.

use std::time::Duration;

use super::history::Effect;
use super::run::Run;
use super::servers::locks::Fault as Way;
use super::servers::proxy::Proxy;
use super::servers::rigs::Part;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnWorkers {
    Kill,
    FreezeShortly,
    FreezeLong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnServers {
    Restart,
    Wipe,
    FreezeShortly,
    FreezeLong,
    ClockForward,
    ClockBack,
    TakeAway,
    Disturb,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnNetwork {
    CutRequests,
    CutReplies,
    CutLong,
    HoldRequests,
    HoldReplies,
    HoldRequestsLong,
    HoldRepliesLong,
    DelayRequests,
    DelayReplies,
    DropReply,
    Reset,
    ResetInReply,
    Refuse,
}

/// An hour.
const JUMP: i64 = 3600;

/// What a server does a moment after it was told to.
const MOMENT: Duration = Duration::from_millis(30);

impl OnWorkers {
    pub(crate) const ALL: &[Self] = &[Self::Kill, Self::FreezeShortly, Self::FreezeLong];

    pub(crate) fn strike(self, run: &mut Run<'_>) {
        let slot = run.slot();
        match self {
            Self::Kill => {
                let kill = || run.crew.replace(slot);
                run.log.during("worker killed", Some(slot), None, Effect::Nothing, kill);
            }
            Self::FreezeShortly => {
                let time = run.between(20, 70);
                self.freeze(run, slot, time);
            }
            Self::FreezeLong => {
                let time = run.between(105, 160);
                self.freeze(run, slot, time);
            }
        }
    }

    fn freeze(self, run: &Run<'_>, slot: u32, time: Duration) {
        let what = if self == Self::FreezeLong { "worker frozen past the ttl" } else { "worker frozen" };
        let number = run.log.begin(what, Some(slot), None, Effect::Freezes);
        run.crew.freeze(slot);
        run.wait(time);
        run.crew.thaw(slot);
        run.log.end(number, Effect::Freezes);
    }
}

impl OnServers {
    /// What can be done to the servers of this kind while tokens must not be turned back: in the first half of a run,
    /// and in the second one. A token may repeat if a server forgets what it drew and its clock was ahead then.
    pub(crate) fn halves(run: &Run<'_>) -> [Vec<Self>; 2] {
        let has = |part| run.kind.obstacle(&[part]).is_none();
        let mut both = Vec::new();
        if has(Part::Server) {
            both.extend([Self::FreezeShortly, Self::FreezeLong, Self::Disturb]);
        }
        if has(Part::TakeAway) {
            both.push(Self::TakeAway);
        }
        let (mut first, mut second) = (both.clone(), both);
        if has(Part::Server) {
            first.push(Self::Restart);
        }
        // Those of PostgreSQL that weren't flushed are forgotten in a crash.
        if has(Part::Persistence) && has(Part::Server) {
            second.push(Self::Restart);
        }
        if has(Part::Data) {
            first.push(Self::Wipe);
        }
        if has(Part::Clock) {
            second.extend([Self::ClockForward, Self::ClockBack]);
        }
        if has(Part::Minority) || !has(Part::Clock) {
            // A server that forgets has no vote, so that the others tell what it drew.
            first.extend(second.iter().filter(|fault| !first.contains(fault)).copied().collect::<Vec<_>>());
            second.clear();
        }
        [first, second]
    }

    /// Whether a server is without a vote, or without locks, for a while after it.
    pub(crate) fn needs_healing(self) -> bool {
        !matches!(self, Self::TakeAway | Self::Disturb | Self::FreezeShortly)
    }

    pub(crate) fn strike(self, run: &mut Run<'_>) {
        let has = |part| run.kind.obstacle(&[part]).is_none();
        let server = run.server();
        let minority = has(Part::Minority);
        let frees_if = |frees: bool| if frees { Effect::Frees } else { Effect::Nothing };
        match self {
            Self::Restart => {
                let effect = frees_if(!has(Part::Persistence));
                let down = run.between(5, 60);
                run.log.during("server restarted", None, None, effect, || {
                    run.rig.kill(server);
                    run.wait(down);
                    run.rig.restart(server);
                });
            }
            Self::Wipe => {
                let wipe = || run.rig.wipe(server);
                run.log.during("data lost", None, None, frees_if(!minority), wipe);
            }
            Self::FreezeShortly | Self::FreezeLong => {
                let long = self == Self::FreezeLong;
                let time = if long { run.between(110, 160) } else { run.between(10, 70) };
                let what = if long { "server frozen past the ttl" } else { "server frozen" };
                run.log.during(what, None, None, Effect::Nothing, || {
                    run.rig.freeze(server);
                    run.wait(time);
                    run.rig.thaw(server);
                });
            }
            Self::ClockForward | Self::ClockBack => self.set_clock(run, server),
            Self::TakeAway => {
                let name = run.name();
                take_away(run, &name);
            }
            Self::Disturb => {
                let number = run.log.begin("disturbed", None, None, Effect::Frees);
                let frees = run.rig.disturb(&mut run.random);
                std::thread::sleep(MOMENT);
                run.log.end(number, frees_if(frees));
            }
        }
    }

    fn set_clock(self, run: &mut Run<'_>, server: usize) {
        // Whether locks expire by the server's clock. One that stands on a bare majority, while others are cut off,
        // then ends by the jump of one server. PostgreSQL looks at the clock again when any timer of a session fires.
        let follows = run.kind.obstacle(&[Part::Expiry]).is_none();
        let (what, seconds) = match self {
            Self::ClockForward => ("clock set forward", JUMP),
            _ => ("clock set back", -JUMP),
        };
        let time = run.between(40, 120);
        let set = |what: &str, seconds, forward: bool| {
            let effect = if follows && forward { Effect::Frees } else { Effect::Nothing };
            run.log.during(what, None, None, effect, || {
                run.rig.set_clock_offset(server, seconds);
                std::thread::sleep(MOMENT);
            });
        };
        let forward = self == Self::ClockForward;
        set(what, seconds, forward);
        run.wait(time);
        set("clock set right", 0, !forward);
        if follows {
            // Those of the dead would stay for an hour, as is documented: an administrator has to help.
            for name in run.names {
                take_away(run, name);
            }
        }
    }
}

fn take_away(run: &Run<'_>, name: &str) {
    // A session takes all of its locks with it.
    let only = (!run.on_sessions()).then_some(name);
    run.log.during("taken away", None, only, Effect::Frees, || {
        run.rig.take_away(name);
        if run.on_sessions() {
            std::thread::sleep(MOMENT);
        }
    });
}

impl OnNetwork {
    pub(crate) const ALL: &[Self] = &[
        Self::CutRequests,
        Self::HoldReplies,
        Self::DropReply,
        Self::Reset,
        Self::CutReplies,
        Self::DelayRequests,
        Self::ResetInReply,
        Self::HoldRequests,
        Self::Refuse,
        Self::DelayReplies,
        Self::HoldRepliesLong,
        Self::HoldRequestsLong,
        Self::CutLong,
    ];

    pub(crate) fn strike(self, run: &mut Run<'_>, slot: u32) {
        let proxies = &run.crew.slots[slot as usize].proxies;
        // One of the servers, or the way to all of them.
        let some = run.random.below(proxies.len() as u64 + 1);
        let some = usize::try_from(some).expect("few");
        let proxies = proxies.get(some..=some).unwrap_or(proxies);
        let (short, long) = (run.between(10, 60), run.between(110, 170));
        let while_delayed = long.min(Duration::from_secs(4));
        let delay = run.between(5, 40).min(Duration::from_secs(2));
        match self {
            Self::CutRequests => Self::cut("requests cut", &[Way::CutRequests], run, slot, proxies, short),
            Self::CutReplies => Self::cut("replies cut", &[Way::CutReplies], run, slot, proxies, short),
            Self::CutLong => {
                let ways = [Way::CutRequests, Way::CutReplies];
                let one = usize::try_from(run.random.below(3)).expect("few");
                let ways = ways.get(one..=one).unwrap_or(&ways);
                Self::cut("cut past the ttl", ways, run, slot, proxies, long);
            }
            Self::HoldRequests => Self::slow("requests held", Way::HoldRequests, run, slot, proxies, short),
            Self::HoldReplies => Self::slow("replies held", Way::HoldReplies, run, slot, proxies, short),
            Self::HoldRequestsLong => {
                Self::slow("requests held past the ttl", Way::HoldRequests, run, slot, proxies, long);
            }
            Self::HoldRepliesLong => {
                Self::slow("replies held past the ttl", Way::HoldReplies, run, slot, proxies, long);
            }
            Self::DelayRequests => {
                Self::slow("requests delayed", Way::DelayRequests(delay), run, slot, proxies, while_delayed);
            }
            Self::DelayReplies => {
                Self::slow("replies delayed", Way::DelayReplies(delay), run, slot, proxies, while_delayed);
            }
            Self::DropReply => {
                let number = run.random.below(5) + 1;
                run.log.during("reply lost", Some(slot), None, Effect::Nothing, || {
                    for proxy in proxies {
                        proxy.drop_reply(number);
                    }
                    run.wait_until(while_delayed, || proxies.iter().all(|proxy| !proxy.is_aiming()));
                    run.wait(short);
                });
                // What the connection that has become silent carries is lost, and nothing else is aimed at.
                mend(run, slot, proxies);
            }
            Self::Reset => reset(run, slot, proxies),
            Self::ResetInReply => {
                let bytes = usize::try_from(run.random.below(12)).expect("few");
                run.log.during("reset in a reply", Some(slot), None, frees_session(run), || {
                    for proxy in proxies {
                        proxy.reset_in_reply(bytes);
                    }
                    run.wait_until(while_delayed, || proxies.iter().all(|proxy| !proxy.is_aiming()));
                    run.wait(short);
                });
                // It may still be to come, and would not be noted then.
                for proxy in proxies {
                    proxy.drop_reply(u64::MAX);
                }
                mend(run, slot, proxies);
            }
            Self::Refuse => {
                run.log.during("refused", Some(slot), None, Effect::Nothing, || {
                    proxies.iter().for_each(Proxy::refuse);
                    reset(run, slot, proxies);
                    run.wait(short);
                    proxies.iter().for_each(Proxy::accept);
                });
            }
        }
    }

    fn cut(what: &str, ways: &[Way], run: &Run<'_>, slot: u32, proxies: &[Proxy], time: Duration) {
        run.log.during(what, Some(slot), None, Effect::Nothing, || {
            for proxy in proxies {
                for way in ways {
                    way.begin(proxy);
                }
            }
            run.wait(time);
        });
        mend(run, slot, proxies);
    }

    fn slow(what: &str, way: Way, run: &Run<'_>, slot: u32, proxies: &[Proxy], time: Duration) {
        run.log.during(what, Some(slot), None, Effect::Nothing, || {
            for proxy in proxies {
                way.begin(proxy);
            }
            run.wait(time);
            proxies.iter().for_each(Way::end);
        });
    }
}

fn frees_session(run: &Run<'_>) -> Effect {
    if run.on_sessions() { Effect::Frees } else { Effect::Nothing }
}

fn reset(run: &Run<'_>, slot: u32, proxies: &[Proxy]) {
    run.log.during("connections reset", Some(slot), None, frees_session(run), || {
        proxies.iter().for_each(Proxy::reset_all);
        std::thread::sleep(MOMENT);
    });
}

/// Ends cuts. A connection on which something was lost must not go on, since TCP loses nothing in between.
fn mend(run: &Run<'_>, slot: u32, proxies: &[Proxy]) {
    proxies.iter().for_each(Proxy::refuse);
    reset(run, slot, proxies);
    proxies.iter().for_each(Way::end);
    proxies.iter().for_each(Proxy::accept);
}
