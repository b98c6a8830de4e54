//! Opens sessions: what they are, and where their fencing tokens come from.

use std::error::Error as _;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OnceCell;

use super::client::{SqlClient, Value, Ways};
use super::connection::SqlConnection;
use super::failure;
use super::key::AppLock;
use super::sql::{self, TokenTable};
use crate::backend::OwnerId;
use crate::engine::sessions::{Connection, Listeners, Role, Server};
use crate::error::{Error, ErrorKind, Result};

/// There is already an object of that name.
const IS_THERE: i32 = 2714;

/// A database of SQL Server.
pub(super) struct SqlServer {
    ways: Ways,
    table: TokenTable,
    principal: Arc<str>,
    statements: Arc<Statements>,
    /// That tokens can be drawn.
    draws: OnceCell<()>,
}

/// Which session it is.
pub(super) struct Identity {
    pub(super) spid: i32,
    /// The lock that it holds as long as it lives.
    pub(super) alive: Arc<str>,
    /// The lock that it holds while it waits for others.
    pub(super) at_work: Arc<str>,
    /// Whose those are.
    pub(super) principal: Arc<str>,
}

/// The statements of the sessions of a provider.
pub(super) struct Statements {
    identify: Arc<str>,
    pub(super) create: Arc<str>,
    /// Draws a token: a parameter of others.
    pub(super) draw: Arc<str>,
    pub(super) try_lock: Arc<str>,
    pub(super) lock: Arc<str>,
    pub(super) unlock: Arc<str>,
    pub(super) token: Arc<str>,
    pub(super) beat: Arc<str>,
    pub(super) is_free: Arc<str>,
}

impl SqlServer {
    pub(super) fn new(ways: Ways, table: TokenTable, principal: Arc<str>) -> Self {
        let statements = Arc::new(Statements {
            identify: sql::IDENTIFY.into(),
            create: table.create().into(),
            draw: table.draw().into(),
            try_lock: sql::try_lock().into(),
            lock: sql::lock().into(),
            unlock: sql::UNLOCK.into(),
            token: sql::token().into(),
            beat: sql::BEAT.into(),
            is_free: sql::IS_FREE.into(),
        });
        Self { ways, table, principal, statements, draws: OnceCell::new() }
    }

    async fn identify(&self, client: &SqlClient) -> Result<(Identity, bool)> {
        // No name of a lock has a colon in its resource.
        let name = OwnerId::random()?.to_hex();
        let alive: Arc<str> = format!("fencelock:session:{name}").into();
        let values = vec![
            Value::Text(alive.clone()),
            Value::Text(self.principal.clone()),
            Value::Text(self.table.quoted().into()),
        ];
        let answer = client.ask(&self.statements.identify, values).await?;
        if !failure::granted(&answer)? {
            return Err(Error::new(ErrorKind::Unavailable, "somebody else has the lock of this session"));
        }
        let identity = Identity {
            spid: answer.require(4)?,
            alive,
            at_work: format!("fencelock:at-work:{name}").into(),
            principal: self.principal.clone(),
        };
        Ok((identity, answer.get::<i32>(5)?.is_some()))
    }
}

/// Makes the table of tokens, unless it is there.
pub(super) async fn create_table(client: &SqlClient, statements: &Statements) -> Result<()> {
    let answer = client.ask(&statements.create, Vec::new()).await?;
    match answer.get::<i32>(2)? {
        Some(IS_THERE) => Ok(()),
        _ => failure::caught(&answer),
    }
}

/// Of a session that isn't there yet: nothing has been changed, whatever went wrong.
fn nothing_done(error: Error) -> Error {
    if error.kind() != ErrorKind::Unknown {
        return error;
    }
    // What it says is known where the server has said it.
    match error.source().and_then(|source| source.downcast_ref::<Error>()) {
        Some(said) => said.duplicate(),
        None => Error::new(ErrorKind::Unavailable, "a session of SQL Server could not be prepared")
            .with_source(error),
    }
}

impl Server for SqlServer {
    type Key = AppLock;
    type Connection = SqlConnection;

    async fn open(&self, _: Role, ttl: Duration, _: &Arc<Listeners<AppLock>>) -> Result<SqlConnection> {
        let settings = sql::settings(ttl);
        let client = SqlClient::connect(&self.ways, &settings).await.map_err(|error| {
            // Where it has been, it is while it moves to another server.
            if error.kind() == ErrorKind::Config && self.draws.initialized() {
                let message = "the database can't be opened for now";
                return Error::new(ErrorKind::Unavailable, message).with_source(error);
            }
            error
        })?;
        let (identity, has_table) = self.identify(&client).await.map_err(nothing_done)?;
        // Somebody may be faster, or it may be there and can't be seen: whether tokens can be drawn tells.
        let created = if has_table { Ok(()) } else { create_table(&client, &self.statements).await };
        let connection = SqlConnection::new(client, identity, self.statements.clone());
        // What is wrong with the table is better known now than at the first grant.
        let draw = || async { connection.token(&AppLock::from("")).await.map(drop) };
        let drawn = if has_table { self.draws.get_or_try_init(draw).await.map(drop) } else { draw().await };
        drawn.map_err(|error| created.err().unwrap_or(error)).map_err(nothing_done)?;
        Ok(connection)
    }
}

impl fmt::Debug for SqlServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlServer").field("table", &self.table).finish_non_exhaustive()
    }
}
