//! The stand-in for SQL Server that the tests have, in this program's first process, for orientation: the times are
//! those of the client and the protocol. By hand: the procedures for locks, no token, no heartbeat.

use std::sync::Arc;
use std::time::Duration;

use fencelock::sqlserver::driver;
use tokio::sync::Mutex;

use crate::backends::{Limit, Site};
use crate::locker::{Locker, Result};
use crate::servers::sqlserver::{DATABASE, SqlServer};
use crate::servers::sqlserver_locks::{Driver, Place, connect};
use crate::workload::{Targets, Workload};

pub(crate) struct StandIn(SqlServer);

impl StandIn {
    pub(crate) fn start() -> Self {
        Self(SqlServer::start())
    }
}

impl Site for StandIn {
    fn url(&self) -> String {
        Place::of(&self.0).url(DATABASE)
    }
}

pub(crate) fn limits(workload: Workload) -> Vec<Limit> {
    let says = match workload {
        Workload::W1 => "`sp_getapplock` + `sp_releaseapplock`",
        Workload::W3 => "blocked in `sp_getapplock`",
        _ => return vec![],
    };
    vec![Limit { way: "raw", says, targets: Targets::NONE }]
}

#[derive(Clone)]
pub(crate) struct Raw(Arc<Mutex<Driver>>);

impl Raw {
    pub(crate) async fn connect(url: &str) -> Result<Self> {
        Ok(Self(Arc::new(Mutex::new(connect(url).await?))))
    }

    async fn ask(&self, sql: &str, name: &str) -> Result<()> {
        let mut client = self.0.lock().await;
        let parameters: [&dyn driver::ToSql; 1] = [&name];
        let row = client.query(sql, &parameters).await?.into_row().await?;
        match row.and_then(|row| row.get::<i32, _>(0)) {
            Some(0..) => Ok(()),
            other => Err(format!("the procedure returned {other:?}").into()),
        }
    }
}

impl Locker for Raw {
    type Guard = String;

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<String> {
        self.lock(name).await
    }

    async fn lock(&self, name: &str) -> Result<String> {
        let sql = "DECLARE @r int; EXEC @r = sp_getapplock @Resource = @P1, @LockMode = 'Exclusive', \
                   @LockOwner = 'Session', @LockTimeout = -1; SELECT @r";
        self.ask(sql, name).await?;
        Ok(name.to_owned())
    }

    async fn unlock(&self, name: String) -> Result<()> {
        let sql =
            "DECLARE @r int; EXEC @r = sp_releaseapplock @Resource = @P1, @LockOwner = 'Session'; SELECT @r";
        self.ask(sql, &name).await
    }
}
