//! Redis servers, started for each trial.

use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use fencelock::redis::driver::Client;
use fencelock::redis::{RedisLocks, Redlock, lock_key};
use fencelock::testing::{Harness, Target};
use fencelock::{Capabilities, LockOptions, LockProvider, Loss};
use tokio::runtime::Runtime;

use super::provider;
use super::servers::redis::RedisServer;

pub(super) fn targets() -> Vec<Arc<dyn Target>> {
    vec![
        Arc::new(Redis { name: "redis", servers: 1, dead: 0, over: Over::Client }),
        Arc::new(Redis { name: "redis-connection", servers: 1, dead: 0, over: Over::Connection }),
        Arc::new(Redis { name: "redlock", servers: 3, dead: 0, over: Over::Client }),
        Arc::new(Redis { name: "redlock-five", servers: 5, dead: 0, over: Over::Client }),
        Arc::new(Redis { name: "redlock-one-of-three-dead", servers: 3, dead: 1, over: Over::Client }),
        Arc::new(Redis { name: "redlock-two-of-five-dead", servers: 5, dead: 2, over: Over::Client }),
    ]
}

/// One server, or Redlock over several, some of which are dead.
#[derive(Clone, Copy, Debug)]
struct Redis {
    name: &'static str,
    servers: usize,
    dead: usize,
    over: Over,
}

/// What the provider is made of.
#[derive(Clone, Copy, Debug)]
enum Over {
    Client,
    /// A connection of the user's, over which nobody can be woken.
    Connection,
}

const PASSWORD: &str = "never-to-be-seen";

impl Redis {
    async fn provider(self, urls: &[&str], options: LockOptions) -> Box<dyn LockProvider> {
        let mut clients = urls.iter().map(|url| Client::open(*url).expect("a URL of ours"));
        if self.servers > 1 {
            return provider(Redlock::new(clients).expect("independent servers"), options);
        }
        let client = clients.next().expect("one server");
        match self.over {
            Over::Client => provider(RedisLocks::new(client), options),
            Over::Connection => {
                // It dies with the runtime that it was opened on, which mustn't be the trial's.
                static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
                let open = async move { client.get_multiplexed_async_connection().await };
                let connection = RUNTIME.spawn(open).await.expect("no panic").expect("the server is there");
                provider(RedisLocks::with_connection(connection), options)
            }
        }
    }
}

#[async_trait]
impl Target for Redis {
    fn name(&self) -> &str {
        self.name
    }

    fn capabilities(&self) -> Capabilities {
        let client = |n| Client::open(format!("redis://127.0.0.1:{n}")).expect("a URL of ours");
        let locks = |locks: &dyn LockProvider| locks.capabilities();
        if self.servers > 1 {
            return locks(&*provider(Redlock::new((1..4).map(client)).expect("three"), LockOptions::new()));
        }
        let capabilities = locks(&*provider(RedisLocks::new(client(1)), LockOptions::new()));
        match self.over {
            Over::Client => capabilities,
            Over::Connection => capabilities.wakes_waiters(false).fairness(fencelock::Fairness::None),
        }
    }

    fn crosses_processes(&self) -> bool {
        true
    }

    fn takes_away(&self) -> bool {
        true
    }

    async fn start(&self) -> Box<dyn Harness> {
        let servers: Vec<_> =
            (0..self.servers).map(|_| RedisServer::options().password(PASSWORD).start()).collect();
        let url = |server: &RedisServer| format!("redis://:{PASSWORD}@{}", server.addr());
        let urls: Vec<_> = servers.iter().map(url).collect();
        let harness = Running { target: *self, servers, urls };
        if self.dead > 0 {
            // All have to be there at first, since none of them has a vote from the beginning.
            let all = harness.provider(LockOptions::new()).await;
            drop(all.create_lock("the first").try_acquire().await.expect("the servers are there"));
            all.close().await.expect("closed");
        }
        harness.servers.iter().take(self.dead).for_each(RedisServer::kill);
        Box::new(harness)
    }

    async fn attach(&self, address: &str) -> Box<dyn LockProvider> {
        let urls: Vec<_> = address.split(' ').collect();
        self.provider(&urls, LockOptions::new()).await
    }
}

#[derive(Debug)]
struct Running {
    target: Redis,
    servers: Vec<RedisServer>,
    urls: Vec<String>,
}

#[async_trait]
impl Harness for Running {
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider> {
        let urls: Vec<_> = self.urls.iter().map(String::as_str).collect();
        self.target.provider(&urls, options).await
    }

    fn address(&self) -> String {
        self.urls.join(" ")
    }

    async fn lose(&self, name: &str) -> Loss {
        let deleted = self.servers.iter().skip(self.target.dead);
        let deleted: Vec<_> = deleted.map(|server| server.command(&["DEL", &lock_key(name)])).collect();
        assert!(deleted.iter().any(|answer| answer == "1"), "somebody holds it: {deleted:?}");
        Loss::Taken
    }

    fn secrets(&self) -> Vec<String> {
        vec![PASSWORD.to_owned()]
    }
}
