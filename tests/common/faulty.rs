//! A backend that fails on demand, over the one in memory: what the engine makes of lost answers, outages and hangs.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fencelock::backend::{Backend, Claim, Due, Grant, Outcome, Released, Renewal};
use fencelock::memory::{Memory, MemoryHold};
use fencelock::{Capabilities, Error, ErrorKind, Provider, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Op {
    Claim,
    Abandon,
    Renew,
    Release,
    Transfer,
    Close,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Nothing is done, and it says so.
    Refuse(ErrorKind),
    /// It is done, and nobody can tell.
    LoseAnswer,
    /// It is done, and the answer never comes.
    NeverAnswer,
    /// Nothing is done, and the answer never comes.
    Hang,
    /// The request takes so long to arrive: dropped before, nothing is done.
    Slow(Duration),
    /// It is done, and answered so much later.
    AnswerLate(Duration),
    Panic,
}

/// One call, as the server sees it.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) op: Op,
    /// Of a claim.
    pub(crate) waits: bool,
    /// Of a renewal: how many grants.
    pub(crate) batch: usize,
    /// Of a claim.
    pub(crate) ttl: Duration,
}

/// Clones share the locks and the faults.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faulty {
    memory: Memory,
    script: Arc<Mutex<Script>>,
    /// Answers `Busy` at once, and never wakes anybody.
    polls: bool,
    /// Hands nothing over in one step.
    never_transfers: bool,
    /// Wants to hear from whoever was handed the lock.
    wants_confirmation: bool,
}

#[derive(Debug, Default)]
struct Script {
    once: HashMap<Op, VecDeque<Fault>>,
    always: HashMap<Op, Fault>,
    calls: Vec<Call>,
}

impl Faulty {
    pub(crate) fn polling(mut self) -> Self {
        self.polls = true;
        self
    }

    pub(crate) fn without_transfer(mut self) -> Self {
        self.never_transfers = true;
        self
    }

    pub(crate) fn wanting_confirmation(mut self) -> Self {
        self.wants_confirmation = true;
        self
    }

    pub(crate) fn provider(&self) -> Provider<Self> {
        Provider::new(self.clone())
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect("no code panics under this lock")
    }

    /// The next such call meets this fault, and the one after it the next fault.
    pub(crate) fn once(&self, op: Op, fault: Fault) -> &Self {
        self.script().once.entry(op).or_default().push_back(fault);
        self
    }

    pub(crate) fn always(&self, op: Op, fault: Fault) -> &Self {
        self.script().always.insert(op, fault);
        self
    }

    pub(crate) fn heal(&self) {
        let mut script = self.script();
        script.always.clear();
        script.once.clear();
    }

    pub(crate) fn calls(&self, op: Op) -> Vec<Call> {
        self.script().calls.iter().filter(|call| call.op == op).cloned().collect()
    }

    pub(crate) fn count(&self, op: Op) -> usize {
        self.calls(op).len()
    }

    fn called(&self, call: Call) -> Option<Fault> {
        let mut script = self.script();
        let op = call.op;
        script.calls.push(call);
        script.once.get_mut(&op).and_then(VecDeque::pop_front).or_else(|| script.always.get(&op).copied())
    }

    async fn meet<T>(&self, call: Call, operation: impl Future<Output = Result<T>>) -> Result<T> {
        let unknown = || Error::new(ErrorKind::Unknown, "the answer was lost");
        match self.called(call) {
            None => operation.await,
            Some(Fault::Refuse(kind)) => Err(Error::new(kind, "refused")),
            Some(Fault::LoseAnswer) => operation.await.and_then(|_| Err(unknown())),
            Some(Fault::NeverAnswer) => {
                drop(operation.await);
                std::future::pending().await
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::AnswerLate(by)) => {
                let answer = operation.await;
                tokio::time::sleep(by).await;
                answer
            }
            Some(Fault::Slow(by)) => {
                tokio::time::sleep(by).await;
                operation.await
            }
            Some(Fault::Panic) => panic!("the backend panicked, as it was told to"),
        }
    }
}

fn call(op: Op) -> Call {
    Call { op, waits: false, batch: 0, ttl: Duration::ZERO }
}

impl Backend for Faulty {
    type Hold = MemoryHold;

    fn name(&self) -> &'static str {
        "faulty"
    }

    fn capabilities(&self) -> Capabilities {
        self.memory.capabilities().keeps_after_exit(false) // so that the engine has to see to it
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<MemoryHold>> {
        let call = Call { waits: !wait.is_zero(), ttl: claim.ttl, ..call(Op::Claim) };
        let wait = if self.polls { Duration::ZERO } else { wait };
        let answer = self.meet(call, self.memory.try_claim(claim, wait)).await?;
        Ok(match answer {
            Outcome::Busy { .. } if self.polls => Outcome::Busy { retry_after: None },
            Outcome::Granted(grant) if self.wants_confirmation => Outcome::Granted(grant.to_be_confirmed()),
            answer => answer,
        })
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        self.meet(call(Op::Abandon), self.memory.abandon(claim)).await
    }

    async fn renew(&self, due: &[Due<'_, MemoryHold>]) -> Vec<Renewal> {
        let call = Call { batch: due.len(), ..call(Op::Renew) };
        let renewal = async { Ok(self.memory.renew(due).await) };
        match self.meet(call, renewal).await {
            Ok(renewals) => renewals,
            Err(error) if error.kind() == ErrorKind::Unknown => Vec::new(),
            Err(error) => {
                let failed = |_| Renewal::Failed(Error::new(error.kind(), "refused"));
                (0..due.len()).map(failed).collect()
            }
        }
    }

    async fn release(&self, hold: &MemoryHold, keep_for: Duration) -> Result<Released> {
        self.meet(call(Op::Release), self.memory.release(hold, keep_for)).await
    }

    async fn close(&self) -> Result<()> {
        self.meet(call(Op::Close), self.memory.close()).await
    }

    async fn transfer(&self, hold: &MemoryHold, to: &Claim) -> Result<Option<Grant<MemoryHold>>> {
        if self.never_transfers {
            return Ok(None);
        }
        self.meet(call(Op::Transfer), self.memory.transfer(hold, to)).await
    }
}
