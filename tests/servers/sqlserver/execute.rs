//! Carries out batches.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::Shared;
use super::evaluate::{Environment, Halt};
use super::locks::{Answer as LockAnswer, Key, Mode, Owner, Spid};
use super::parse::{Batch, Column, Insert, Item, Kind, Name, ParseError, Select, Setting, Statement, Update};
use super::tokens::{Answer, Done, Heading};
use super::values::{self, KeyPart, RowKey, SqlError, Value};
use super::world::{Aim, Database, End, Fate, Table, Undo, World};

/// Why a batch doesn't go on.
#[derive(Debug)]
pub(super) enum Stop {
    /// A statement has failed, which a TRY around it may catch, unless that is in this scope.
    Error(SqlError, Option<usize>),
    /// The scope ends. Its error is told already.
    Scope,
    /// The whole batch ends. Its error is told already.
    Batch,
    /// The connection ends with this.
    Fatal(SqlError),
    /// There is no session any more.
    Ended,
}

/// How the statements after one go on.
#[derive(Debug)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
    Return(i32),
}

/// How long a lock took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Waited {
    No,
    Yes,
    InVain,
    Deadlock,
}

/// A batch, or the text that `sp_executesql` got, while it runs.
pub(super) struct Scope {
    pub(super) batch: Arc<Batch>,
    pub(super) variables: Vec<Value>,
    pub(super) depth: usize,
}

/// Carries out one request.
pub(super) struct Executor<'a> {
    pub(super) shared: &'a Shared,
    pub(super) spid: Spid,
    pub(super) answer: Answer,
    /// How the ends of statements are marked.
    pub(super) done: Done,
    /// How many TRY blocks are around, in whichever scope.
    pub(super) tries: usize,
    /// The errors that are being handled.
    pub(super) caught: Vec<SqlError>,
    /// What fails at the first statement with this text, or at the first of all if that is empty.
    pub(super) fault: Option<(String, SqlError)>,
}

/// Takes a request out of a queue when it is cancelled.
struct Queued<'a> {
    shared: &'a Shared,
    key: &'a Key,
    id: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        let mut world = self.shared.world();
        if world.locks.forget(self.key, self.id) {
            world.changed();
        }
    }
}

/// As an error, if the login may not do it.
pub(super) fn check_right(environment: &Environment<'_>, action: &str, table: &Name) -> Result<(), Halt> {
    let session = environment.session();
    if session.denied.contains(&action) {
        let message = format!(
            "The {action} permission was denied on the object '{}', database '{}', schema 'dbo'.",
            table.table, session.database
        );
        return Err(Halt::Error(SqlError { state: 5, ..SqlError::new(229, 14, message) }));
    }
    Ok(())
}

impl<'a> Executor<'a> {
    pub(super) fn new(shared: &'a Shared, spid: Spid, procedure: bool, fates: &[Aim], text: &str) -> Self {
        let done = if procedure { Done::InProcedure } else { Done::Statement };
        let fault = fates.iter().find_map(|aim| match &aim.fate {
            Fate::Fail(error) => {
                let part = if text.contains(&aim.part) { aim.part.clone() } else { String::new() };
                Some((part, error.clone()))
            }
            _ => None,
        });
        Self { shared, spid, answer: Answer::default(), done, tries: 0, caught: Vec::new(), fault }
    }

    /// Carries out a text as a scope of its own, and returns its status.
    pub(super) async fn run(
        &mut self,
        text: &str,
        declared: &str,
        values: Vec<Value>,
        depth: usize,
    ) -> Result<i32, Stop> {
        let parsed = self.shared.world().cache.batch(text, declared);
        let batch = parsed
            .map_err(|ParseError { number, message }| Stop::Error(SqlError::new(number, 15, message), None));
        let batch = match batch {
            Err(Stop::Error(error, _)) if self.tries == 0 => {
                self.report(&error);
                return Ok(i32::try_from(error.number).expect("it is small"));
            }
            other => other?,
        };
        let mut variables = vec![Value::Null; batch.variables.len()];
        for ((variable, slot), value) in batch.variables.iter().zip(&mut variables).zip(values) {
            *slot = value.cast(variable.of).map_err(|error| Stop::Error(error, None))?;
        }
        let before = self.session(|session| (session.transactions, session.settings))?;
        let mut scope = Scope { batch: batch.clone(), variables, depth };
        let result = self.statements(&mut scope, &batch.statements).await;
        let nested = depth > 0 || self.done == Done::InProcedure;
        if nested {
            let after = self.session(|session| {
                session.settings = before.1;
                session.transactions
            })?;
            if after != before.0 && result.is_ok() {
                let message = format!(
                    "Transaction count after EXECUTE indicates a mismatching number of BEGIN and COMMIT statements. \
                     Previous count = {}, current count = {after}.",
                    before.0
                );
                self.report(&SqlError::new(266, 16, message));
            }
        }
        match result {
            Ok(Flow::Return(status)) => Ok(status),
            Ok(_) => Ok(0),
            Err(Stop::Scope) => self.session(|session| i32::try_from(session.last_error).unwrap_or(1)),
            Err(Stop::Error(error, _)) => Err(Stop::Error(error, None)),
            Err(stop) => Err(stop),
        }
    }

    /// What follows the last statement of a request.
    pub(super) fn end_of_batch(&mut self) {
        let mut world = self.shared.world();
        let doomed = world.sessions.get(&self.spid).is_some_and(|session| session.doomed);
        if doomed {
            let ended = world.rollback(self.spid);
            drop(world);
            if let Some(transaction) = ended {
                self.answer.ended(transaction, false);
            }
            let message = "Uncommittable transaction is detected at the end of the batch. The transaction is \
                           rolled back.";
            self.report(&SqlError::new(3998, 16, message));
        }
    }

    pub(super) fn session<T>(&self, take: impl FnOnce(&mut super::world::Session) -> T) -> Result<T, Stop> {
        self.shared.world().sessions.get_mut(&self.spid).map(take).ok_or(Stop::Ended)
    }

    /// Tells the client about an error.
    pub(super) fn report(&mut self, error: &SqlError) {
        self.answer.error(error);
        self.answer.done(self.done, None);
        // If the session has ended, nobody asks.
        let _ = self.session(|session| session.last_error = error.number);
    }

    pub(super) async fn statements(
        &mut self,
        scope: &mut Scope,
        statements: &[Statement],
    ) -> Result<Flow, Stop> {
        for statement in statements {
            match Box::pin(self.statement(scope, statement)).await {
                Ok(Flow::Next) => {}
                Err(Stop::Error(error, uncompiled)) if self.tries == 0 => {
                    if error.class <= 10 {
                        self.answer.information(error.number, &error.message);
                        continue;
                    }
                    self.report(&error);
                    let aborts = self.session(|session| session.settings.aborts_transactions)?;
                    if aborts || error.number == 1205 {
                        let ended = self.shared.world().rollback(self.spid);
                        if let Some(transaction) = ended {
                            self.answer.ended(transaction, false);
                        }
                        return Err(Stop::Batch);
                    }
                    if uncompiled.is_some() {
                        return Err(Stop::Scope);
                    }
                }
                other => return other,
            }
        }
        Ok(Flow::Next)
    }

    fn strike(&mut self, text: &str) -> Result<(), Stop> {
        match self.fault.take_if(|(part, _)| text.contains(part.as_str())) {
            Some((_, error)) if error.class >= 20 => Err(Stop::Fatal(error)),
            Some((_, error)) => Err(Stop::Error(error, None)),
            None => Ok(()),
        }
    }

    #[expect(clippy::too_many_lines, reason = "each kind of statement has its line")]
    async fn statement(&mut self, scope: &mut Scope, statement: &Statement) -> Result<Flow, Stop> {
        if self.fault.is_some() {
            let end = match &statement.kind {
                Kind::If(_, body, _) | Kind::While(_, body) => body.span.start,
                Kind::Block(_) | Kind::Try(..) | Kind::Nothing => statement.span.start,
                _ => statement.span.end,
            };
            if end > statement.span.start {
                let batch = scope.batch.clone();
                self.strike(&batch.text[statement.span.start..end])?;
            }
        }
        let mut rows = 0;
        match &statement.kind {
            Kind::Nothing => return Ok(Flow::Next),
            Kind::Block(body) => return self.statements(scope, body).await,
            Kind::If(condition, then, otherwise) => {
                let holds = self.attempt(scope, |environment| environment.truth(condition)).await?;
                let body = if holds == Some(true) { Some(then) } else { otherwise.as_ref() };
                let Some(body) = body else { return Ok(Flow::Next) };
                return self.statements(scope, std::slice::from_ref(body)).await;
            }
            Kind::While(condition, body) => {
                while self.attempt(scope, |environment| environment.truth(condition)).await? == Some(true) {
                    match self.statements(scope, std::slice::from_ref(body)).await? {
                        Flow::Break => break,
                        flow @ Flow::Return(_) => return Ok(flow),
                        Flow::Next | Flow::Continue => tokio::task::yield_now().await,
                    }
                }
            }
            Kind::Break => return Ok(Flow::Break),
            Kind::Continue => return Ok(Flow::Continue),
            Kind::Try(body, handler) => return self.try_catch(scope, body, handler).await,
            Kind::Return(value) => {
                let Some(value) = value else { return Ok(Flow::Return(0)) };
                let value = self.attempt(scope, |environment| environment.value(value)).await?;
                let status = value.integer().and_then(|value| i32::try_from(value).ok()).unwrap_or(0);
                return Ok(Flow::Return(status));
            }
            Kind::Assign(assignments) => {
                for (number, value) in assignments {
                    let value = self.attempt(scope, |environment| environment.value(value)).await?;
                    Self::assign(scope, *number, &value)?;
                    rows = 1;
                }
            }
            Kind::Set(setting) => self.set(*setting)?,
            Kind::Execute(call) => {
                let mut arguments = Vec::new();
                for argument in &call.arguments {
                    let value = self.attempt(scope, |environment| environment.value(&argument.value)).await?;
                    arguments.push((argument.name.clone(), value));
                }
                let status = self.procedure(&call.procedure, arguments, scope.depth).await?;
                if let Some(number) = call.result {
                    Self::assign(scope, number, &Value::Int(status))?;
                }
                if self.done == Done::Statement && scope.depth == 0 {
                    self.answer.status(status);
                    self.answer.done(Done::Procedure, None);
                }
                return Ok(Flow::Next);
            }
            Kind::ExecuteText(parts) => {
                let mut text = String::new();
                for part in parts {
                    let value = self.attempt(scope, |environment| environment.value(part)).await?;
                    text.push_str(&value.to_text().unwrap_or_default());
                }
                Box::pin(self.run(&text, "", Vec::new(), scope.depth + 1)).await?;
                return Ok(Flow::Next);
            }
            Kind::Select(select) => rows = self.select(scope, select).await?,
            Kind::Update(update) => rows = self.update(scope, update).await?,
            Kind::Insert(insert) => rows = self.insert(scope, insert).await?,
            Kind::Delete(table, filter) => rows = self.delete(scope, table, filter.as_ref()).await?,
            Kind::CreateTable(name, columns) => self.create_table(scope, name, columns).await?,
            Kind::DropTable(name, lenient) => self.drop_table(scope, name, *lenient).await?,
            Kind::CreateDatabase(name) => self.create_database(name)?,
            Kind::DropDatabase(name) => self.drop_database(name)?,
            Kind::Use(name) => self.use_database(name)?,
            Kind::Begin => self.begin_transaction(),
            Kind::Commit => self.commit()?,
            Kind::Rollback => self.rollback()?,
            Kind::Kill(value) => {
                let value = self.attempt(scope, |environment| environment.value(value)).await?;
                self.kill(value.integer().unwrap_or_default())?;
            }
            Kind::Print(value) => {
                let value = self.attempt(scope, |environment| environment.value(value)).await?;
                self.answer.information(0, &value.to_text().unwrap_or_default());
            }
            Kind::Throw(None) => {
                let error = self.caught.last().cloned().unwrap_or_else(|| {
                    SqlError::new(
                        10704,
                        15,
                        "To rethrow an error, a THROW statement must be used inside a CATCH block.",
                    )
                });
                return Err(Stop::Error(error, Some(usize::MAX)));
            }
            Kind::Throw(Some((number, message, state))) => {
                let (number, message, state) = self
                    .attempt(scope, |environment| {
                        let number = environment.value(number)?;
                        Ok((number, environment.value(message)?, environment.value(state)?))
                    })
                    .await?;
                let error = made_error(number.integer(), &message, Some(16), state.integer());
                return Err(Stop::Error(error, Some(usize::MAX)));
            }
            Kind::RaiseError(message, class, state) => {
                let (message, class, state) = self
                    .attempt(scope, |environment| {
                        let message = environment.value(message)?;
                        Ok((message, environment.value(class)?, environment.value(state)?))
                    })
                    .await?;
                let error = made_error(Some(50_000), &message, class.integer(), state.integer());
                if error.class <= 10 {
                    self.answer.information(error.number, &error.message);
                } else {
                    return Err(if error.class >= 20 {
                        Stop::Fatal(error)
                    } else {
                        Stop::Error(error, None)
                    });
                }
            }
            Kind::WaitFor(value) => {
                let value = self.attempt(scope, |environment| environment.value(value)).await?;
                let time = value.to_text().and_then(|text| values::time_of_day(&text)).unwrap_or_default();
                sleep(Duration::from_nanos(u64::try_from(time).unwrap_or_default() * 100)).await;
            }
        }
        self.session(|session| {
            session.row_count = rows;
            session.last_error = 0;
        })?;
        Ok(Flow::Next)
    }

    async fn try_catch(
        &mut self,
        scope: &mut Scope,
        body: &[Statement],
        handler: &[Statement],
    ) -> Result<Flow, Stop> {
        self.tries += 1;
        let result = self.statements(scope, body).await;
        self.tries -= 1;
        let error = match result {
            Err(Stop::Error(error, uncompiled)) if uncompiled != Some(scope.depth) => error,
            other => return other,
        };
        self.session(|session| {
            let aborts = session.settings.aborts_transactions || error.number == 1205;
            session.doomed |= session.transactions > 0 && aborts;
            session.last_error = error.number;
        })?;
        self.caught.push(error);
        let result = self.statements(scope, handler).await;
        self.caught.pop();
        result
    }

    fn assign(scope: &mut Scope, number: usize, value: &Value) -> Result<(), Stop> {
        let of = scope.batch.variables[number].of;
        scope.variables[number] = value.cast(of).map_err(|error| Stop::Error(error, None))?;
        Ok(())
    }

    fn set(&mut self, setting: Setting) -> Result<(), Stop> {
        self.session(|session| {
            let settings = &mut session.settings;
            match setting {
                Setting::NoCount(on) => settings.no_count = on,
                Setting::AbortTransactions(on) => settings.aborts_transactions = on,
                Setting::ImplicitTransactions(on) => settings.implicit_transactions = on,
                Setting::LockTimeout(timeout) => settings.lock_timeout = timeout,
                Setting::Isolation { keeps, waits } => (settings.keeps, settings.waits) = (keeps, waits),
                Setting::Other => {}
            }
        })
    }

    /// Does something that only reads, as often as it takes until no lock is in its way.
    async fn attempt<T>(
        &mut self,
        scope: &Scope,
        mut step: impl FnMut(&Environment<'_>) -> Result<T, Halt>,
    ) -> Result<T, Stop> {
        self.change(scope, |environment| step(environment).map(|value| (value, Vec::new())), |_, _| Ok(()))
            .await
    }

    /// Does something in two steps: the first reads, and names the locks it needs; with all of those, the second
    /// writes. If a lock is missing, it waits for it, and begins again.
    async fn change<T, P>(
        &mut self,
        scope: &Scope,
        mut plan: impl FnMut(&Environment<'_>) -> Result<(P, Vec<(Key, Mode)>), Halt>,
        mut write: impl FnMut(&mut World, &P) -> Result<T, SqlError>,
    ) -> Result<P, Stop>
    where
        T: Default,
    {
        let mut shared = Vec::new();
        loop {
            let (key, mode, timeout) = {
                let mut world = self.shared.world();
                let halt = if world.sessions.contains_key(&self.spid) {
                    let environment = Environment {
                        world: &world,
                        spid: self.spid,
                        variables: &scope.variables,
                        types: &scope.batch.variables,
                        caught: self.caught.last(),
                        columns: None,
                        row: None,
                        old: None,
                        group: None,
                    };
                    match plan(&environment) {
                        Err(halt) => halt,
                        Ok((planned, locks)) => {
                            let owner = Owner::Transaction(self.spid);
                            let missing =
                                locks.iter().find(|(key, mode)| !world.locks.take(key, owner, *mode));
                            match missing {
                                Some((key, mode)) => Halt::Blocked(key.clone(), *mode),
                                None => match write(&mut world, &planned) {
                                    Ok(_) => {
                                        self.end_statement(&mut world, &shared);
                                        return Ok(planned);
                                    }
                                    Err(error) => Halt::Error(error),
                                },
                            }
                        }
                    }
                } else {
                    return Err(Stop::Ended);
                };
                let failed = match halt {
                    Halt::Blocked(key, mode) => {
                        Ok((key, mode, world.sessions[&self.spid].settings.lock_timeout))
                    }
                    Halt::Error(error) => Err(Stop::Error(error, None)),
                    Halt::Uncompiled(error) => Err(Stop::Error(error, Some(scope.depth))),
                };
                match failed {
                    Ok(blocked) => blocked,
                    Err(stop) => {
                        self.end_statement(&mut world, &shared);
                        return Err(stop);
                    }
                }
            };
            let error = match self.wait(&key, Owner::Transaction(self.spid), mode, timeout).await? {
                Waited::InVain => SqlError::new(1222, 16, "Lock request time out period exceeded."),
                Waited::Deadlock => {
                    let message = format!(
                        "Transaction (Process ID {}) was deadlocked on lock resources with another process and has \
                         been chosen as the deadlock victim. Rerun the transaction.",
                        self.spid
                    );
                    SqlError::new(1205, 13, message)
                }
                Waited::No | Waited::Yes => {
                    if matches!(mode, Mode::Shared | Mode::IntentShared) {
                        shared.push(key);
                    }
                    continue;
                }
            };
            self.end_statement(&mut self.shared.world(), &shared);
            return Err(Stop::Error(error, None));
        }
    }

    /// Frees the locks that don't outlive the statement.
    fn end_statement(&self, world: &mut World, shared: &[Key]) {
        let Some(session) = world.sessions.get(&self.spid) else { return };
        if session.transactions == 0 {
            world.release_transaction(self.spid);
        } else {
            for key in shared {
                world.locks.release(key, Owner::Transaction(self.spid));
            }
        }
    }

    /// Takes a lock, waiting for so many milliseconds, or for ever if they are negative.
    pub(super) async fn wait(
        &mut self,
        key: &Key,
        owner: Owner,
        mode: Mode,
        timeout: i32,
    ) -> Result<Waited, Stop> {
        let (id, granted) = {
            let mut world = self.shared.world();
            if !world.sessions.contains_key(&self.spid) {
                return Err(Stop::Ended);
            }
            if timeout == 0 {
                let taken = world.locks.take(key, owner, mode);
                world.changed();
                return Ok(if taken { Waited::No } else { Waited::InVain });
            }
            let answer = world.locks.request(key, owner, mode);
            world.changed();
            match answer {
                LockAnswer::Granted => return Ok(Waited::No),
                LockAnswer::Deadlock => return Ok(Waited::Deadlock),
                LockAnswer::Queued(id, granted) => (id, granted),
            }
        };
        let _queued = Queued { shared: self.shared, key, id };
        let over = async {
            match u64::try_from(timeout) {
                Ok(timeout) => sleep(Duration::from_millis(timeout)).await,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            granted = granted => granted.map(|()| Waited::Yes).map_err(|_| Stop::Ended),
            () = over => {
                let mut world = self.shared.world();
                let gave_up = world.locks.forget(key, id);
                world.changed();
                Ok(if gave_up { Waited::InVain } else { Waited::Yes })
            }
        }
    }

    fn finish_rows(&mut self, rows: usize, returned: Option<(&[Heading], &[Vec<Value>])>) -> i64 {
        let silent = self.session(|session| session.settings.no_count).unwrap_or(false);
        if let Some((headings, found)) = returned {
            self.answer.columns(headings);
            for row in found {
                self.answer.row(headings, row);
            }
        }
        if !silent || returned.is_some() {
            self.answer.done(self.done, if silent { None } else { Some(rows as u64) });
        }
        i64::try_from(rows).expect("rows are few")
    }

    async fn select(&mut self, scope: &mut Scope, select: &Select) -> Result<i64, Stop> {
        if select.from.is_some() {
            self.begin_implicitly();
        }
        let found = self
            .change(
                scope,
                |environment| {
                    let mut found = environment.select(select)?;
                    let locks = found.read.drain(..).map(|key| (key, Mode::Shared)).collect();
                    Ok((found, locks))
                },
                |_, _| Ok(()),
            )
            .await?;
        if let [Item::Assign(..), ..] = select.items[..] {
            if let Some(row) = found.rows.last() {
                for (item, value) in select.items.iter().zip(row) {
                    if let Item::Assign(number, _) = item {
                        Self::assign(scope, *number, value)?;
                    }
                }
            }
            return Ok(i64::try_from(found.rows.len()).expect("rows are few"));
        }
        Ok(self.finish_rows(found.rows.len(), Some((&found.headings, &found.rows))))
    }

    fn check_write(environment: &Environment<'_>, database: &str) -> Result<(), Halt> {
        if environment.session().doomed {
            let message = "The current transaction cannot be committed and cannot support operations that write to the \
                           log file. Roll back the transaction.";
            return Err(SqlError::new(3930, 16, message).into());
        }
        match environment.world.databases.get(database) {
            Some(database) if database.read_only => {
                let message = format!(
                    "Failed to update database \"{}\" because the database is read-only.",
                    database.name
                );
                Err(SqlError::new(3906, 16, message).into())
            }
            _ => Ok(()),
        }
    }

    async fn update(&mut self, scope: &mut Scope, update: &Update) -> Result<i64, Stop> {
        self.begin_implicitly();
        let spid = self.spid;
        let name = &update.table;
        let (_, changed, output, headings, assigned) = self
            .change(
                scope,
                |environment| {
                    let (database, table) = environment.table(name)?;
                    check_right(environment, "UPDATE", name)?;
                    if update.filter.is_some() || !update.output.is_empty() {
                        check_right(environment, "SELECT", name)?;
                    }
                    Self::check_write(environment, &database)?;
                    let inner = Environment { columns: Some(&table.columns), ..*environment };
                    let (mut changed, mut output, mut locks) = (Vec::new(), Vec::new(), Vec::new());
                    let mut variables = scope.variables.clone();
                    for (key, row) in inner.candidates(table, update.filter.as_ref())? {
                        let lock = Key::Row(database.clone(), name.table.as_str().into(), key.clone());
                        if !environment.world.locks.is_free_for(&lock, Owner::Transaction(spid), Mode::Update)
                        {
                            return Err(Halt::Blocked(lock, Mode::Update));
                        }
                        let at = Environment { row: Some(row), old: Some(row), ..inner };
                        if let Some(filter) = &update.filter
                            && at.truth(filter)? != Some(true)
                        {
                            continue;
                        }
                        let mut new = row.clone();
                        let mut assigned = Vec::new();
                        {
                            let at = Environment { variables: &variables, ..at };
                            for change in &update.changes {
                                let mut value = at.value(&change.value)?;
                                if let Some(column) = &change.column {
                                    let place = column_place(table, column)?;
                                    value = stored(&table.columns[place], &value, name)?;
                                    new[place] = value.clone();
                                }
                                if let Some(number) = change.variable {
                                    assigned.push((number, value.cast(scope.batch.variables[number].of)?));
                                }
                            }
                        }
                        for (number, value) in assigned {
                            variables[number] = value;
                        }
                        let after = Environment { row: Some(&new), old: Some(row), ..inner };
                        let values: Result<Vec<_>, _> =
                            update.output.iter().map(|(value, _)| after.value(value)).collect();
                        output.push(values?);
                        locks.push((lock, Mode::Exclusive));
                        changed.push((key.clone(), new));
                    }
                    let headings: Vec<Heading> =
                        update.output.iter().map(|(value, name)| inner.heading(value, name)).collect();
                    for change in &update.changes {
                        change.column.as_ref().map(|column| column_place(table, column)).transpose()?;
                    }
                    Ok(((database, changed, output, headings, variables), locks))
                },
                |world, (database, changed, ..)| {
                    write_rows(world, spid, database, &name.table, changed);
                    Ok(())
                },
            )
            .await?;
        scope.variables = assigned;
        let returned = if update.output.is_empty() { None } else { Some((&headings[..], &output[..])) };
        Ok(self.finish_rows(changed.len(), returned))
    }

    async fn insert(&mut self, scope: &mut Scope, insert: &Insert) -> Result<i64, Stop> {
        self.begin_implicitly();
        let spid = self.spid;
        let name = &insert.table;
        let first = self.shared.world().new_row();
        let (_, rows, output, headings) = self
            .change(
                scope,
                |environment| {
                    let (database, table) = environment.table(name)?;
                    check_right(environment, "INSERT", name)?;
                    Self::check_write(environment, &database)?;
                    let columns: Vec<usize> = if insert.columns.is_empty() {
                        (0..table.columns.len()).collect()
                    } else {
                        insert.columns.iter().map(|column| column_place(table, column)).collect::<Result<_, _>>()?
                    };
                    let mut sources = Vec::new();
                    for row in &insert.rows {
                        sources.push(row.iter().map(|value| environment.value(value)).collect::<Result<Vec<_>, _>>()?);
                    }
                    if let Some(select) = &insert.from {
                        sources.extend(environment.select(select)?.rows);
                    }
                    let inner = Environment { columns: Some(&table.columns), ..*environment };
                    let (mut rows, mut output, mut locks) = (Vec::new(), Vec::new(), Vec::new());
                    for (number, source) in sources.into_iter().enumerate() {
                        if source.len() != columns.len() {
                            let message = "There are more columns in the INSERT statement than values specified in the \
                                           VALUES clause, or the other way round.";
                            return Err(SqlError::new(109, 15, message).into());
                        }
                        let mut row = vec![Value::Null; table.columns.len()];
                        for (place, value) in columns.iter().zip(source) {
                            row[*place] = value;
                        }
                        for (column, value) in table.columns.iter().zip(&mut row) {
                            *value = stored(column, value, name)?;
                        }
                        let mut key: RowKey = table
                            .columns
                            .iter()
                            .zip(&row)
                            .filter(|(column, _)| column.key)
                            .map(|(_, value)| value.key())
                            .collect();
                        if key.is_empty() {
                            let number = i64::try_from(number).expect("they are few");
                            key = vec![KeyPart::Integer(first), KeyPart::Integer(number)];
                        }
                        let after = Environment { row: Some(&row), ..inner };
                        let values: Result<Vec<_>, _> =
                            insert.output.iter().map(|(value, _)| after.value(value)).collect();
                        output.push(values?);
                        let lock = Key::Row(database.clone(), name.table.as_str().into(), key.clone());
                        locks.push((lock, Mode::Exclusive));
                        rows.push((key, row));
                    }
                    let headings: Vec<Heading> =
                        insert.output.iter().map(|(value, name)| inner.heading(value, name)).collect();
                    Ok(((database, rows, output, headings), locks))
                },
                |world, (database, rows, ..)| {
                    let tables = &world.databases[database].tables;
                    let mut keys = std::collections::HashSet::new();
                    for (key, _) in rows {
                        if tables[&name.table].rows.contains_key(key) || !keys.insert(key) {
                            let message = format!(
                                "Violation of PRIMARY KEY constraint 'PK_{0}'. Cannot insert duplicate key in object \
                                 'dbo.{0}'.",
                                name.table
                            );
                            return Err(SqlError::new(2627, 14, message));
                        }
                    }
                    write_rows(world, spid, database, &name.table, rows);
                    Ok(())
                },
            )
            .await?;
        let returned = if insert.output.is_empty() { None } else { Some((&headings[..], &output[..])) };
        Ok(self.finish_rows(rows.len(), returned))
    }

    async fn delete(
        &mut self,
        scope: &Scope,
        name: &Name,
        filter: Option<&super::parse::Expression>,
    ) -> Result<i64, Stop> {
        self.begin_implicitly();
        let spid = self.spid;
        let (_, keys) = self
            .change(
                scope,
                |environment| {
                    let (database, table) = environment.table(name)?;
                    check_right(environment, "DELETE", name)?;
                    Self::check_write(environment, &database)?;
                    let inner = Environment { columns: Some(&table.columns), ..*environment };
                    let (mut keys, mut locks) = (Vec::new(), Vec::new());
                    for (key, row) in inner.candidates(table, filter)? {
                        let at = Environment { row: Some(row), ..inner };
                        let passes = filter.map(|filter| at.truth(filter)).transpose()?;
                        if passes.is_none_or(|passes| passes == Some(true)) {
                            let lock = Key::Row(database.clone(), name.table.as_str().into(), key.clone());
                            locks.push((lock, Mode::Exclusive));
                            keys.push(key.clone());
                        }
                    }
                    Ok(((database, keys), locks))
                },
                |world, (database, keys)| {
                    for key in keys {
                        let old = table_of(world, database, &name.table).rows.remove(key);
                        world.remember(spid, || {
                            Undo::Row(database.clone(), name.table.clone(), key.clone(), old)
                        });
                    }
                    Ok(())
                },
            )
            .await?;
        Ok(self.finish_rows(keys.len(), None))
    }

    async fn create_table(&mut self, scope: &Scope, name: &Name, columns: &[Column]) -> Result<(), Stop> {
        self.begin_implicitly();
        let spid = self.spid;
        self.change(
            scope,
            |environment| {
                let session = environment.session();
                let database = name.database.as_deref().map_or(session.database.clone(), Into::into);
                if session.denied.contains(&"CREATE TABLE") {
                    let message = format!("CREATE TABLE permission denied in database '{database}'.");
                    return Err(SqlError::new(262, 14, message).into());
                }
                Self::check_write(environment, &database)?;
                let key = Key::Table(database.clone(), name.table.as_str().into());
                Ok((database, vec![(key, Mode::Exclusive)]))
            },
            |world, database| {
                let id = world.new_object();
                let Some(tables) = world.databases.get_mut(database).map(|database| &mut database.tables)
                else {
                    return Err(no_database(database));
                };
                if tables.contains_key(&name.table) {
                    let message =
                        format!("There is already an object named '{}' in the database.", name.table);
                    return Err(SqlError { state: 6, ..SqlError::new(2714, 16, message) });
                }
                let table = Table { id, columns: columns.into(), rows: std::collections::BTreeMap::new() };
                tables.insert(name.table.clone(), table);
                world.remember(spid, || Undo::Table(database.clone(), name.table.clone(), None));
                Ok(())
            },
        )
        .await?;
        Ok(())
    }

    async fn drop_table(&mut self, scope: &Scope, name: &Name, lenient: bool) -> Result<(), Stop> {
        let spid = self.spid;
        self.change(
            scope,
            |environment| {
                let session = environment.session();
                let database = name.database.as_deref().map_or(session.database.clone(), Into::into);
                Self::check_write(environment, &database)?;
                let key = Key::Table(database.clone(), name.table.as_str().into());
                Ok((database, vec![(key, Mode::Exclusive)]))
            },
            |world, database| {
                let found =
                    world.databases.get_mut(database).and_then(|database| database.tables.remove(&name.table));
                if found.is_none() && !lenient {
                    let message = format!(
                        "Cannot drop the table '{}', because it does not exist or you do not have permission.",
                        name.written
                    );
                    return Err(SqlError { state: 5, ..SqlError::new(3701, 11, message) });
                }
                if found.is_some() {
                    world.remember(spid, || Undo::Table(database.clone(), name.table.clone(), found));
                }
                Ok(())
            },
        )
        .await?;
        Ok(())
    }

    fn administrator(&self, what: &str) -> Result<(), Stop> {
        if self.session(|session| session.login == "sa")? {
            return Ok(());
        }
        let message = format!("{what} permission denied in database 'master'.");
        Err(Stop::Error(SqlError::new(262, 14, message), None))
    }

    fn create_database(&mut self, name: &str) -> Result<(), Stop> {
        self.administrator("CREATE DATABASE")?;
        let mut world = self.shared.world();
        let key: Arc<str> = name.to_lowercase().into();
        if world.databases.contains_key(&key) {
            let message = format!("Database '{name}' already exists. Choose a different database name.");
            return Err(Stop::Error(SqlError::new(1801, 16, message), None));
        }
        world.databases.insert(key, Database { name: name.to_owned(), ..Database::default() });
        Ok(())
    }

    fn drop_database(&mut self, name: &str) -> Result<(), Stop> {
        self.administrator("DROP DATABASE")?;
        let mut world = self.shared.world();
        let key = name.to_lowercase();
        if world.sessions.values().any(|session| *session.database == *key) {
            let message = format!("Cannot drop database \"{name}\" because it is currently in use.");
            return Err(Stop::Error(SqlError::new(3702, 16, message), None));
        }
        match world.databases.remove(key.as_str()) {
            Some(_) => Ok(()),
            None => Err(Stop::Error(SqlError::new(3701, 11, no_database(name).message), None)),
        }
    }

    fn use_database(&mut self, name: &str) -> Result<(), Stop> {
        let mut world = self.shared.world();
        let key: Arc<str> = name.to_lowercase().into();
        let Some(database) = world.databases.get(&key) else {
            return Err(Stop::Error(no_database(name), None));
        };
        let new = database.name.clone();
        let session = world.sessions.get_mut(&self.spid).ok_or(Stop::Ended)?;
        let old = std::mem::replace(&mut session.database, key);
        drop(world);
        self.answer.change(1, &new, &old);
        self.answer.information(5701, &format!("Changed database context to '{new}'."));
        Ok(())
    }

    fn begin_implicitly(&mut self) {
        let wanted =
            self.session(|session| session.settings.implicit_transactions && session.transactions == 0);
        if wanted.unwrap_or(false) {
            self.begin_transaction();
        }
    }

    /// Begins a transaction.
    pub(super) fn begin_transaction(&mut self) {
        let begun = self.shared.world().begin(self.spid);
        if let Some(transaction) = begun {
            self.answer.begun(transaction);
        }
    }

    /// Commits a transaction.
    pub(super) fn commit(&mut self) -> Result<(), Stop> {
        let (count, doomed) = self.session(|session| (session.transactions, session.doomed))?;
        if count == 0 {
            let message = "The COMMIT TRANSACTION request has no corresponding BEGIN TRANSACTION.";
            return Err(Stop::Error(SqlError::new(3902, 16, message), None));
        }
        if doomed {
            let message = "The current transaction cannot be committed and cannot support operations that write to the \
                           log file. Roll back the transaction.";
            return Err(Stop::Error(SqlError::new(3930, 16, message), None));
        }
        let ended = self.shared.world().commit(self.spid);
        if let Some(transaction) = ended {
            self.answer.ended(transaction, true);
        }
        Ok(())
    }

    /// Rolls a transaction back.
    pub(super) fn rollback(&mut self) -> Result<(), Stop> {
        let ended = self.shared.world().rollback(self.spid);
        let Some(transaction) = ended else {
            let message = "The ROLLBACK TRANSACTION request has no corresponding BEGIN TRANSACTION.";
            return Err(Stop::Error(SqlError::new(3903, 16, message), None));
        };
        self.answer.ended(transaction, false);
        Ok(())
    }

    fn kill(&mut self, spid: i64) -> Result<(), Stop> {
        let error =
            |number, class, message: String| Err(Stop::Error(SqlError::new(number, class, message), None));
        if !self.session(|session| session.login == "sa")? {
            return error(6102, 14, "User does not have permission to use the KILL statement.".to_owned());
        }
        if spid == i64::from(self.spid) {
            return error(6104, 16, "Cannot use KILL to kill your own process.".to_owned());
        }
        let killed = match Spid::try_from(spid) {
            Ok(spid) => self.shared.world().end_session(spid, End::Killed(true)),
            Err(_) => false,
        };
        if killed {
            return Ok(());
        }
        error(6106, 16, format!("Process ID {spid} is not an active process ID."))
    }
}

fn no_database(name: &str) -> SqlError {
    let message = format!("Database '{name}' does not exist. Make sure that the name is entered correctly.");
    SqlError::new(911, 16, message)
}

fn made_error(number: Option<i64>, message: &Value, class: Option<i64>, state: Option<i64>) -> SqlError {
    SqlError {
        number: number.and_then(|number| u32::try_from(number).ok()).unwrap_or(50_000),
        class: class.and_then(|class| u8::try_from(class).ok()).unwrap_or(16),
        state: state.and_then(|state| u8::try_from(state).ok()).unwrap_or(1),
        message: message.to_text().unwrap_or_default().to_string(),
    }
}

fn column_place(table: &Table, column: &str) -> Result<usize, Halt> {
    table
        .column(column)
        .ok_or_else(|| Halt::Uncompiled(SqlError::new(207, 16, format!("Invalid column name '{column}'."))))
}

/// A value as a column stores it.
fn stored(column: &Column, value: &Value, table: &Name) -> Result<Value, SqlError> {
    if value.is_null() && !column.nullable {
        let message = format!(
            "Cannot insert the value NULL into column '{}', table '{}'; column does not allow nulls. The statement \
             fails.",
            column.name, table.table
        );
        return Err(SqlError { state: 2, ..SqlError::new(515, 16, message) });
    }
    let stored = value.cast(column.of)?;
    if let (Value::Text(before), Value::Text(after)) = (value, &stored)
        && before.trim_end_matches(' ').len() > after.len()
    {
        let message = format!(
            "String or binary data would be truncated in table '{}', column '{}'.",
            table.table, column.name
        );
        return Err(SqlError::new(2628, 16, message));
    }
    Ok(stored)
}

fn table_of<'w>(world: &'w mut World, database: &str, table: &str) -> &'w mut Table {
    let database = world.databases.get_mut(database).expect("it was there a moment ago");
    database.tables.get_mut(table).expect("it was there a moment ago")
}

fn write_rows(world: &mut World, spid: Spid, database: &Arc<str>, name: &str, rows: &[(RowKey, Vec<Value>)]) {
    for (key, row) in rows {
        let old = table_of(world, database, name).rows.insert(key.clone(), row.clone());
        world.remember(spid, || Undo::Row(database.clone(), name.to_owned(), key.clone(), old));
    }
}
