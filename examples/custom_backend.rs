//! A whole backend of one's own, a table in memory, and the suite that says whether it is right:
//! `cargo run --example custom_backend --features testing`

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use fencelock::backend::{Backend, Claim, Due, Grant, Instant, Outcome, OwnerId, Released, Renewal};
use fencelock::testing::{self, Harness, Target};
use fencelock::{
    Capabilities, Expiry, FencingToken, LockName, LockOptions, LockProvider, Loss, Provider, Result,
};

/// What the "server" keeps of a lock: the last token, and who has it until when.
type Row = (u64, Option<(OwnerId, Instant)>);

#[derive(Clone, Debug, Default)]
struct Table(Arc<Mutex<HashMap<LockName, Row>>>);

impl Table {
    /// Runs `then` on the row of this name if `owner` has the lock, and it has not expired.
    fn if_held(&self, (name, owner): &(LockName, OwnerId), then: impl FnOnce(&mut Row)) -> bool {
        let mut rows = self.0.lock().expect("no code panics under this lock");
        let row = rows.entry(name.clone()).or_default();
        let held = row.1.is_some_and(|(holder, until)| holder == *owner && !until.has_passed());
        held.then(|| then(row)).is_some()
    }
}

impl Backend for Table {
    type Hold = (LockName, OwnerId);

    fn name(&self) -> &'static str {
        "table"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Duration::from_millis(1), Duration::from_secs(3600), Expiry::Ttl)
    }

    async fn try_claim(&self, claim: &Claim, _wait: Duration) -> Result<Outcome<Self::Hold>> {
        let valid_until = Instant::now() + claim.ttl; // counted from before the request
        let mut rows = self.0.lock().expect("no code panics under this lock");
        let (last_token, holder) = rows.entry(claim.name.clone()).or_default();
        if let Some((_, until)) = holder.filter(|(_, until)| !until.has_passed()) {
            return Ok(Outcome::Busy { retry_after: Some(until.remaining()) });
        }
        let token = FencingToken::after(*last_token, SystemTime::now())?;
        (*last_token, *holder) = (token.get(), Some((claim.owner, valid_until)));
        Ok(Outcome::Granted(Grant::lease((claim.name.clone(), claim.owner), token, valid_until)))
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        self.if_held(&(claim.name.clone(), claim.owner), |row| row.1 = None);
        Ok(())
    }

    async fn renew(&self, due: &[Due<'_, Self::Hold>]) -> Vec<Renewal> {
        let renew = |due: &Due<'_, Self::Hold>| {
            let until = Instant::now() + due.ttl;
            let renewed = self.if_held(due.hold, |row| row.1 = Some((due.hold.1, until)));
            if renewed { Renewal::Until(until) } else { Renewal::Lost(Loss::Taken) }
        };
        due.iter().map(renew).collect()
    }

    async fn release(&self, hold: &Self::Hold, _keep_for: Duration) -> Result<Released> {
        let released = self.if_held(hold, |row| row.1 = None);
        Ok(if released { Released::Yes } else { Released::NotHeld })
    }
}

#[async_trait]
impl Harness for Table {
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider> {
        Box::new(Provider::builder(self.clone()).options(options).build().expect("these options can be"))
    }
}

#[async_trait]
impl Target for Table {
    fn name(&self) -> &'static str {
        "table"
    }

    fn capabilities(&self) -> Capabilities {
        Backend::capabilities(self)
    }

    async fn start(&self) -> Box<dyn Harness> {
        Box::new(Self::default())
    }
}

fn main() -> ExitCode {
    testing::main(vec![Arc::new(Table::default())])
}
