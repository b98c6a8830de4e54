//! The SQL Server that tests run against: a stand-in, or the one that `FENCELOCK_SQLSERVER_URL` names.

use std::collections::BTreeSet;

use fencelock::sqlserver::driver::{AuthMethod, Client, Config, EncryptionLevel, SqlBrowser};
use fencelock::sqlserver::{SqlServerLocks, lock_resource};
use percent_encoding::percent_decode_str;
use tokio::net::TcpStream;
use tokio_util::compat::{Compat, TokioAsyncWriteCompatExt};

use super::sqlserver::{ADMINISTRATOR, DATABASE, PASSWORD, SessionState, SqlServer};

/// A client of the driver's.
pub(crate) type Driver = Client<Compat<TcpStream>>;

/// The variable that names a server to test against.
pub(crate) const VARIABLE: &str = "FENCELOCK_SQLSERVER_URL";

/// Where a server is, and who may do everything there.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// `sqlserver://LOGIN:PASSWORD@HOST:PORT`.
    base: String,
    /// From the question mark on.
    query: String,
}

impl Place {
    /// The server that the environment names, which has to be a URL with a login that may make and drop databases, and
    /// `KILL`.
    pub(crate) fn of_environment() -> Option<Self> {
        std::env::var(VARIABLE).ok().filter(|url| !url.is_empty()).map(|url| Self::of_url(&url))
    }

    /// A stand-in.
    pub(crate) fn of(server: &SqlServer) -> Self {
        Self::of_url(&format!("sqlserver://{ADMINISTRATOR}:{PASSWORD}@{}?encrypt=off", server.addr()))
    }

    fn of_url(url: &str) -> Self {
        let (address, query) = url.split_once('?').unwrap_or((url, ""));
        let scheme = address.find("//").expect("the URL names a host") + 2;
        let end = address[scheme..].find('/').map_or(address.len(), |slash| scheme + slash);
        let query = if query.is_empty() { String::new() } else { format!("?{query}") };
        Self { base: address[..end].to_owned(), query }
    }

    /// The URL of a database there.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("{}/{database}{}", self.base, self.query)
    }

    /// What isn't to be seen anywhere.
    pub(crate) fn password(&self) -> String {
        let (_, login) = self.base.split_once("//").expect("a URL");
        let (login, _) = login.rsplit_once('@').expect("a login");
        login.split_once(':').expect("a password").1.to_owned()
    }

    /// Carries out some SQL in a database. The values of the first column of all rows, those that are numbers.
    pub(crate) async fn sql(&self, database: &str, sql: &str) -> Result<Vec<i32>, String> {
        let mut client = connect(&self.url(database)).await?;
        let results = async { client.simple_query(sql.to_owned()).await?.into_results().await };
        let rows = results.await.map_err(|error| error.to_string())?.into_iter().flatten();
        Ok(rows.filter_map(|row| row.try_get::<i32, _>(0).ok().flatten()).collect())
    }

    /// The session that holds the lock of this name, by the views of a real server, which need rights.
    pub(crate) async fn holder(&self, database: &str, name: &str) -> Option<i32> {
        let resource: String = lock_resource(name).chars().take(32).collect();
        let sql = format!(
            "SELECT CAST(request_session_id AS int) FROM sys.dm_tran_locks WHERE resource_type = 'APPLICATION' \
             AND request_status = 'GRANT' AND resource_database_id = DB_ID() \
             AND resource_description LIKE '%[[]{resource}]%'"
        );
        self.sql(database, &sql).await.expect("the views can be read").first().copied()
    }
}

/// The driver's configuration for a URL, as far as tests need it: `encrypt` and `trust_server_certificate`.
pub(crate) fn config(url: &str) -> Config {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let (login, host) =
        address.strip_prefix("sqlserver://").and_then(|rest| rest.rsplit_once('@')).expect("login and host");
    let (user, password) = login.split_once(':').expect("user and password");
    let (host, database) = host.split_once('/').expect("host and database");
    let (host, port) = host.rsplit_once(':').unwrap_or((host, "1433"));
    let decoded = |text: &str| percent_decode_str(text).decode_utf8().expect("UTF-8").into_owned();
    let mut config = Config::new();
    config.host(host);
    config.port(port.parse().expect("a port"));
    if !database.is_empty() {
        config.database(decoded(database));
    }
    config.authentication(AuthMethod::sql_server(decoded(user), decoded(password)));
    if query.contains("encrypt=off") {
        config.encryption(EncryptionLevel::NotSupported);
    }
    if query.contains("trust_server_certificate=true") {
        config.trust_cert();
    }
    config
}

/// Locks on the database of a URL.
pub(crate) fn locks(url: &str) -> SqlServerLocks {
    SqlServerLocks::new(config(url))
}

/// A client of a test's own.
pub(crate) async fn connect(url: &str) -> Result<Driver, String> {
    let config = config(url);
    let socket = TcpStream::connect_named(&config).await.map_err(|error| error.to_string())?;
    let connected = Box::pin(Client::connect(config, socket.compat_write())); // a large one
    connected.await.map_err(|error| error.to_string())
}

/// What a stand-in shows of locks, by their names.
impl SqlServer {
    /// The session that has the lock of this name.
    ///
    /// # Panics
    ///
    /// If nobody has.
    pub(crate) fn holder_of(&self, name: &str) -> u16 {
        let holder = self.holder(DATABASE, &lock_resource(name));
        holder.unwrap_or_else(|| panic!("nobody has {name}: {:#?}", self.sessions()))
    }

    /// The session that waits for the lock of this name.
    ///
    /// # Panics
    ///
    /// If nobody does.
    pub(crate) fn waiter_of(&self, name: &str) -> u16 {
        let wanted = format!("{DATABASE}/public/{}", lock_resource(name));
        let waits = |session: &SessionState| session.waits_for.as_deref() == Some(&*wanted);
        self.sessions().into_iter().find(waits).unwrap_or_else(|| panic!("nobody waits for {name}")).spid
    }

    /// Waits until so many block on the server for a lock.
    pub(crate) async fn until_blocked(&self, name: &str, count: usize) {
        self.until_waiting(DATABASE, &lock_resource(name), count).await;
    }

    /// Waits until nobody has the lock of this name, or waits for it.
    pub(crate) async fn until_gone(&self, name: &str) {
        self.until_blocked(name, 0).await;
        self.until_free(DATABASE, &lock_resource(name)).await;
    }

    /// Waits until nothing is held or waited for, but the locks by which sessions show that they live.
    pub(crate) async fn until_all_free(&self) {
        let mark = format!("{DATABASE}/public/fencelock:session:");
        let is_idle = |session: &SessionState| {
            session.waits_for.is_none() && session.holds.iter().all(|lock| lock.starts_with(&mark))
        };
        self.until("no lock is left", || self.sessions().iter().all(is_idle)).await;
    }

    /// The numbers of the sessions.
    pub(crate) fn spids(&self) -> BTreeSet<u16> {
        self.sessions().into_iter().map(|session| session.spid).collect()
    }
}
