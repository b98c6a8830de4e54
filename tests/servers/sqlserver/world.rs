//! What the server knows: databases, sessions, locks, and what shall go wrong.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::locks::{Key, Locks, Owner, Spid};
use super::parse::{Cache, Column};
use super::values::{RowKey, SqlError, Value};

/// The database of those who name none.
pub(super) const MASTER: &str = "master";

/// All of the server but its sockets.
#[derive(Debug)]
pub(super) struct World {
    pub(super) databases: HashMap<Arc<str>, Database>,
    pub(super) sessions: BTreeMap<Spid, Session>,
    pub(super) locks: Locks,
    /// The principals of all databases, in lower case.
    pub(super) principals: HashSet<String>,
    pub(super) cache: Cache,
    pub(super) aims: Vec<Aim>,
    /// Nothing but what this session asks is struck, if there is one.
    pub(super) aims_only_at: Option<Spid>,
    /// What the next `sp_getapplock` returns if its resource contains this.
    pub(super) getapplock_returns: Option<(String, i32)>,
    /// In microseconds.
    pub(super) clock_offset: i64,
    pub(super) delay: Duration,
    pub(super) stalls_logins: bool,
    pub(super) connections: u64,
    pub(super) open_connections: u64,
    /// Sessions that were killed, whose connections are not closed yet.
    pub(super) closing: HashSet<Spid>,
    pub(super) requests: u64,
    /// Counts all that happens to sessions and locks.
    pub(super) changes: watch::Sender<u64>,
    last_transaction: u64,
    last_object: i32,
    last_row: i64,
}

#[derive(Debug, Default)]
pub(super) struct Database {
    pub(super) name: String,
    pub(super) read_only: bool,
    /// By their names in lower case.
    pub(super) tables: HashMap<String, Table>,
}

#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) id: i32,
    pub(super) columns: Arc<[Column]>,
    pub(super) rows: BTreeMap<RowKey, Vec<Value>>,
}

impl Table {
    pub(super) fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }
}

/// What a `SET` changes, until the end of the session or of the `sp_executesql`.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches of their own")]
pub(super) struct Settings {
    pub(super) no_count: bool,
    pub(super) aborts_transactions: bool,
    pub(super) implicit_transactions: bool,
    pub(super) lock_timeout: i32,
    /// Whether rows that were read stay locked.
    pub(super) keeps: bool,
    /// Whether reading waits for writers.
    pub(super) waits: bool,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) login: String,
    /// What the login may not do, such as `UPDATE`.
    pub(super) denied: Vec<&'static str>,
    pub(super) database: Arc<str>,
    pub(super) settings: Settings,
    /// `@@TRANCOUNT`.
    pub(super) transactions: u32,
    pub(super) transaction: u64,
    pub(super) doomed: bool,
    pub(super) undo: Vec<Undo>,
    pub(super) row_count: i64,
    pub(super) last_error: u32,
    pub(super) end: watch::Sender<Option<End>>,
}

/// Why a session has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum End {
    /// With the error that tells it to a request under way, or without.
    Killed(bool),
    /// The connection has ended.
    Over,
}

/// What a rollback does.
#[derive(Debug)]
pub(super) enum Undo {
    Row(Arc<str>, String, RowKey, Option<Vec<Value>>),
    Table(Arc<str>, String, Option<Table>),
}

/// What happens to a request that contains this.
#[derive(Clone, Debug)]
pub(super) struct Aim {
    pub(super) part: String,
    pub(super) fate: Fate,
}

#[derive(Clone, Debug)]
pub(super) enum Fate {
    LoseAnswer,
    ResetAfter(usize),
    RepeatLastAnswer,
    Fail(SqlError),
}

impl World {
    pub(super) fn new(databases: &[String], principals: HashSet<String>, read_only: bool) -> Self {
        let named = |name: &str| {
            let read_only = read_only && name != MASTER;
            (name.to_lowercase().into(), Database { name: name.to_owned(), read_only, ..Database::default() })
        };
        Self {
            databases: databases.iter().map(String::as_str).chain([MASTER]).map(named).collect(),
            sessions: BTreeMap::new(),
            locks: Locks::default(),
            principals,
            cache: Cache::default(),
            aims: Vec::new(),
            aims_only_at: None,
            getapplock_returns: None,
            clock_offset: 0,
            delay: Duration::ZERO,
            stalls_logins: false,
            connections: 0,
            open_connections: 0,
            closing: HashSet::new(),
            requests: 0,
            changes: watch::Sender::new(0),
            last_transaction: 0,
            last_object: 1_000_000,
            last_row: 0,
        }
    }

    /// Something has happened to sessions or locks.
    pub(super) fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// In microseconds since 1970, in whole milliseconds unless it was moved by a part of one.
    pub(super) fn now(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
        i64::try_from(now.as_micros()).expect("it fits for long") + self.clock_offset
    }

    /// A session, with the smallest free number, as a server gives them.
    pub(super) fn begin_session(
        &mut self,
        login: &str,
        denied: Vec<&'static str>,
        database: Arc<str>,
    ) -> (Spid, watch::Receiver<Option<End>>) {
        let is_free = |spid: &Spid| !self.sessions.contains_key(spid) && !self.closing.contains(spid);
        let spid = (51..Spid::MAX).find(is_free).expect("there are enough");
        let settings = Settings {
            no_count: false,
            aborts_transactions: false,
            implicit_transactions: false,
            lock_timeout: -1,
            keeps: false,
            waits: true,
        };
        let (end, ended) = watch::channel(None);
        let session = Session {
            login: login.to_owned(),
            denied,
            database,
            settings,
            transactions: 0,
            transaction: 0,
            doomed: false,
            undo: Vec::new(),
            row_count: 0,
            last_error: 0,
            end,
        };
        self.sessions.insert(spid, session);
        self.changed();
        (spid, ended)
    }

    /// Rolls back, frees all locks, and tells the connection. False if there is no such session.
    pub(super) fn end_session(&mut self, spid: Spid, why: End) -> bool {
        self.rollback(spid);
        let Some(session) = self.sessions.remove(&spid) else { return false };
        if matches!(why, End::Killed(_)) {
            self.closing.insert(spid);
        }
        session.end.send_replace(Some(why));
        self.locks.end(spid);
        self.changed();
        true
    }

    /// Ends a session whose connection ends by itself.
    pub(super) fn end_session_quietly(&mut self, spid: Spid) {
        self.rollback(spid);
        self.locks.end(spid);
        self.changed();
    }

    /// A request was broken off by its client: its statement has no locks any more, unless in a transaction.
    pub(super) fn cancelled(&mut self, spid: Spid) {
        let Some(session) = self.sessions.get(&spid) else { return };
        if session.settings.aborts_transactions {
            self.rollback(spid);
        } else if session.transactions == 0 {
            self.release_transaction(spid);
        }
    }

    /// Begins a transaction, or one more in it. Returns its number if it is new.
    pub(super) fn begin(&mut self, spid: Spid) -> Option<u64> {
        let session = self.sessions.get_mut(&spid)?;
        session.transactions += 1;
        if session.transactions > 1 {
            return None;
        }
        self.last_transaction += 1;
        session.transaction = self.last_transaction;
        session.doomed = false;
        Some(session.transaction)
    }

    /// Ends the innermost transaction. Returns its number if it was the outermost one.
    pub(super) fn commit(&mut self, spid: Spid) -> Option<u64> {
        let session = self.sessions.get_mut(&spid)?;
        session.transactions = session.transactions.saturating_sub(1);
        if session.transactions > 0 {
            return None;
        }
        session.undo.clear();
        let transaction = session.transaction;
        self.release_transaction(spid);
        Some(transaction)
    }

    /// Takes back what was done since the outermost transaction began, and returns its number.
    pub(super) fn rollback(&mut self, spid: Spid) -> Option<u64> {
        let session = self.sessions.get_mut(&spid)?;
        let began = session.transactions > 0;
        session.transactions = 0;
        session.doomed = false;
        let (transaction, undo) = (session.transaction, std::mem::take(&mut session.undo));
        for undo in undo.into_iter().rev() {
            match undo {
                Undo::Row(database, table, key, row) => {
                    let tables = self.databases.get_mut(&database).map(|database| &mut database.tables);
                    let Some(table) = tables.and_then(|tables| tables.get_mut(&table)) else { continue };
                    match row {
                        Some(row) => table.rows.insert(key, row),
                        None => table.rows.remove(&key),
                    };
                }
                Undo::Table(database, name, table) => {
                    let Some(database) = self.databases.get_mut(&database) else { continue };
                    match table {
                        Some(table) => database.tables.insert(name, table),
                        None => database.tables.remove(&name),
                    };
                }
            }
        }
        self.release_transaction(spid);
        began.then_some(transaction)
    }

    /// Frees what a transaction, or a statement without one, has locked.
    pub(super) fn release_transaction(&mut self, spid: Spid) {
        if self.locks.release_all(Owner::Transaction(spid)) {
            self.changed();
        }
    }

    /// Remembers how to take something back, if there is a transaction.
    pub(super) fn remember(&mut self, spid: Spid, undo: impl FnOnce() -> Undo) {
        if let Some(session) = self.sessions.get_mut(&spid).filter(|session| session.transactions > 0) {
            session.undo.push(undo());
        }
    }

    /// For a new table.
    pub(super) fn new_object(&mut self) -> i32 {
        self.last_object += 16;
        self.last_object
    }

    /// For a row of a table without a key.
    pub(super) fn new_row(&mut self) -> i64 {
        self.last_row += 1;
        self.last_row
    }

    /// The fates of a request of this session, of which each aim is one.
    pub(super) fn fates(&mut self, spid: Spid, texts: &[&str]) -> Vec<Aim> {
        if self.aims.is_empty() || self.aims_only_at.is_some_and(|only| only != spid) {
            return Vec::new();
        }
        let mut kinds = HashSet::new();
        let mut hit = Vec::new();
        self.aims.retain(|aim| {
            let matches = texts.iter().any(|text| text.contains(&aim.part));
            let taken = matches && kinds.insert(std::mem::discriminant(&aim.fate));
            if taken {
                hit.push(aim.clone());
            }
            !taken
        });
        hit
    }
}

/// A lock, for people.
pub(super) fn described(key: &Key) -> String {
    let mut text = String::new();
    let written = match key {
        Key::Application(database, principal, resource) => write!(text, "{database}/{principal}/{resource}"),
        Key::Table(database, table) => write!(text, "table {database}.{table}"),
        Key::Row(database, table, row) => write!(text, "row {database}.{table} {row:?}"),
    };
    written.expect("a string can be written to");
    text
}
