//! One element in a list: whoever pops it has the lock, and pushes it to give it back.

use std::time::Duration;

use fencelock::redis::driver::aio::MultiplexedConnection;
use fencelock::redis::driver::{AsyncConnectionConfig, Client, cmd};

use crate::locker::{Locker, Result};
use crate::pool::Pool;
use crate::workload::CONTENDED;

#[derive(Clone)]
pub(super) struct Blpop {
    client: Client,
    idle: Pool<MultiplexedConnection>,
}

impl Blpop {
    pub(super) async fn connect(url: &str) -> Result<Self> {
        let this = Self { client: Client::open(url)?, idle: Pool::default() };
        let mut connection = this.open().await?;
        // The first process makes the element.
        let made: bool = cmd("SETNX").arg("made").arg(1).query_async(&mut connection).await?;
        if made {
            cmd("LPUSH").arg(list(CONTENDED)).arg("x").query_async::<()>(&mut connection).await?;
        }
        this.idle.put(connection);
        Ok(this)
    }

    async fn open(&self) -> Result<MultiplexedConnection> {
        let patient = AsyncConnectionConfig::new().set_response_timeout(None);
        Ok(self.client.get_multiplexed_async_connection_with_config(&patient).await?)
    }
}

fn list(name: &str) -> String {
    format!("{name}:list")
}

impl Locker for Blpop {
    type Guard = (String, MultiplexedConnection);

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<Self::Guard> {
        self.lock(name).await
    }

    async fn lock(&self, name: &str) -> Result<Self::Guard> {
        let mut connection = self.idle.get(async || self.open().await).await?;
        cmd("BLPOP").arg(list(name)).arg(0).query_async::<(String, String)>(&mut connection).await?;
        Ok((name.to_owned(), connection))
    }

    async fn unlock(&self, (name, mut connection): Self::Guard) -> Result<()> {
        cmd("LPUSH").arg(list(&name)).arg("x").query_async::<()>(&mut connection).await?;
        self.idle.put(connection);
        Ok(())
    }
}
