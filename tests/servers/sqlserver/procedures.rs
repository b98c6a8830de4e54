//! The procedures and functions of application locks, and `sp_executesql`.

use std::sync::Arc;

use super::evaluate::{Environment, Halt};
use super::execute::{Executor, Stop, Waited};
use super::locks::{Key, Mode, Owner, Spid};
use super::values::{self, SqlError, Type, Value};
use super::world::World;

/// What the procedures return if a parameter is wrong.
const FAILED: i32 = -999;

/// A resource has no more units of UTF-16; the rest is cut off.
const LONGEST_RESOURCE: u16 = 255;

fn invalid(what: &str, procedure: &str) -> SqlError {
    SqlError::new(1224, 16, format!("An invalid application lock {what} was passed to {procedure}."))
}

fn no_transaction() -> SqlError {
    let message = "You attempted to acquire a transactional application lock without an active transaction.";
    SqlError::new(15626, 16, message)
}

fn key(world: &World, spid: Spid, principal: &str, resource: &str, whose: &str) -> Result<Key, SqlError> {
    let principal = principal.trim_end().to_lowercase();
    if !world.principals.contains(&principal) {
        let message =
            "An invalid database principal was passed to the application lock function or procedure.";
        return Err(SqlError::new(1230, 16, message));
    }
    if resource.is_empty() {
        return Err(invalid("resource", whose));
    }
    let database = world.sessions[&spid].database.clone();
    Ok(Key::Application(database, principal.into(), values::cut(&resource.into(), LONGEST_RESOURCE)))
}

fn owner(spid: Spid, name: &str, whose: &str) -> Result<Owner, SqlError> {
    match name.trim_end().to_lowercase().as_str() {
        "session" => Ok(Owner::Session(spid)),
        "transaction" => Ok(Owner::Transaction(spid)),
        _ => Err(SqlError { number: 1226, ..invalid("owner", whose) }),
    }
}

fn mode(name: &str, whose: &str) -> Result<Mode, SqlError> {
    Mode::named(name).ok_or_else(|| SqlError { number: 1225, ..invalid("mode", whose) })
}

fn text(value: &Value) -> Arc<str> {
    value.to_text().unwrap_or_default()
}

/// `APPLOCK_TEST(principal, resource, mode, owner)`.
pub(super) fn applock_test(environment: &Environment<'_>, values: &[Value]) -> Result<Value, Halt> {
    let whose = "APPLOCK_TEST";
    let (world, spid) = (environment.world, environment.spid);
    let key = key(world, spid, &text(&values[0]), &text(&values[1]), whose)?;
    let mode = mode(&text(&values[2]), whose)?;
    let owner = owner(spid, &text(&values[3]), whose)?;
    if matches!(owner, Owner::Transaction(_)) && environment.session().transactions == 0 {
        return Err(no_transaction().into());
    }
    Ok(Value::Int(world.locks.is_free_for(&key, owner, mode).into()))
}

/// `APPLOCK_MODE(principal, resource, owner)`.
pub(super) fn applock_mode(environment: &Environment<'_>, values: &[Value]) -> Result<Value, Halt> {
    let whose = "APPLOCK_MODE";
    let key = key(environment.world, environment.spid, &text(&values[0]), &text(&values[1]), whose)?;
    let owner = owner(environment.spid, &text(&values[2]), whose)?;
    Ok(Value::text(environment.world.locks.mode(&key, owner).map_or("NoLock", Mode::name)))
}

/// A parameter of a procedure: its name, type, and what it is if it is missing, unless it must be given.
type Parameter = (&'static str, Type, Option<&'static str>);

fn bind(
    procedure: &str,
    parameters: &[Parameter],
    arguments: Vec<(Option<String>, Value)>,
) -> Result<Vec<Value>, SqlError> {
    let mut values: Vec<Option<Value>> = vec![None; parameters.len()];
    for (place, (name, value)) in arguments.into_iter().enumerate() {
        let place = match &name {
            Some(name) => parameters.iter().position(|(known, ..)| known.eq_ignore_ascii_case(name)),
            None => Some(place).filter(|place| *place < parameters.len()),
        };
        let Some(place) = place else {
            let Some(name) = name else {
                let message = format!("Procedure or function {procedure} has too many arguments specified.");
                return Err(SqlError::new(8144, 16, message));
            };
            let message = format!("{name} is not a parameter for procedure {procedure}.");
            return Err(SqlError::new(8145, 16, message));
        };
        values[place] = Some(value.cast(parameters[place].1)?);
    }
    parameters
        .iter()
        .zip(values)
        .map(|((name, _, default), value)| match (value, default) {
            (Some(value), _) => Ok(value),
            (None, Some(default)) => Ok(if default.is_empty() { Value::Null } else { Value::text(default) }),
            (None, None) => {
                let message = format!(
                    "Procedure or function '{procedure}' expects parameter '{name}', which was not supplied."
                );
                Err(SqlError::new(201, 16, message))
            }
        })
        .collect()
}

impl Executor<'_> {
    /// Carries out a procedure, and returns its status.
    pub(super) async fn procedure(
        &mut self,
        name: &str,
        arguments: Vec<(Option<String>, Value)>,
        depth: usize,
    ) -> Result<i32, Stop> {
        match name.to_lowercase().rsplit('.').next().unwrap_or_default() {
            "sp_getapplock" => self.get(arguments).await,
            "sp_releaseapplock" => self.release(arguments),
            "sp_executesql" => self.execute_sql(arguments, depth + 1).await,
            _ => {
                let message = format!("Could not find stored procedure '{name}'.");
                Err(Stop::Error(SqlError { state: 62, ..SqlError::new(2812, 16, message) }, None))
            }
        }
    }

    /// An error that a procedure raises: control goes to a TRY around it, or else it returns its status.
    fn raise(&mut self, error: SqlError) -> Result<i32, Stop> {
        if self.tries > 0 {
            return Err(Stop::Error(error, None));
        }
        if self.session(|session| session.settings.aborts_transactions)? {
            return Err(Stop::Error(error, None));
        }
        self.report(&error);
        Ok(FAILED)
    }

    async fn get(&mut self, arguments: Vec<(Option<String>, Value)>) -> Result<i32, Stop> {
        let whose = "sp_getapplock";
        let parameters = [
            ("@Resource", Type::NVarChar(LONGEST_RESOURCE), None),
            ("@LockMode", Type::VarChar(32), None),
            ("@LockOwner", Type::VarChar(32), Some("Transaction")),
            ("@LockTimeout", Type::Int, Some("")),
            ("@DbPrincipal", Type::NVarChar(128), Some("public")),
        ];
        let values = bind(whose, &parameters, arguments).map_err(|error| Stop::Error(error, None))?;
        let spid = self.spid;
        let prepared = {
            let mut world = self.shared.world();
            let Some(session) = world.sessions.get(&spid) else { return Err(Stop::Ended) };
            let (in_transaction, default) = (session.transactions > 0, session.settings.lock_timeout);
            let resource = text(&values[0]);
            if world.getapplock_returns.as_ref().is_some_and(|(part, _)| resource.contains(part.as_str())) {
                let (_, code) = world.getapplock_returns.take().expect("it is there");
                return Ok(code);
            }
            let timeout = match values[3].integer() {
                Some(timeout) => i32::try_from(timeout).expect("it is an int"),
                None => default,
            };
            mode(&text(&values[1]), whose).and_then(|mode| {
                let owner = owner(spid, &text(&values[2]), whose)?;
                if matches!(owner, Owner::Transaction(_)) && !in_transaction {
                    return Err(no_transaction());
                }
                if timeout < -1 {
                    return Err(SqlError { number: 1227, ..invalid("time-out", whose) });
                }
                Ok((key(&world, spid, &text(&values[4]), &resource, whose)?, owner, mode, timeout))
            })
        };
        let (key, owner, mode, timeout) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return self.raise(error),
        };
        Ok(match self.wait(&key, owner, mode, timeout).await? {
            Waited::No => 0,
            Waited::Yes => 1,
            Waited::InVain if timeout == 0 && self.shared.busy_is_999 => FAILED,
            Waited::InVain => -1,
            Waited::Deadlock => -3,
        })
    }

    fn release(&mut self, arguments: Vec<(Option<String>, Value)>) -> Result<i32, Stop> {
        let whose = "sp_releaseapplock";
        let parameters = [
            ("@Resource", Type::NVarChar(LONGEST_RESOURCE), None),
            ("@LockOwner", Type::VarChar(32), Some("Transaction")),
            ("@DbPrincipal", Type::NVarChar(128), Some("public")),
        ];
        let values = bind(whose, &parameters, arguments).map_err(|error| Stop::Error(error, None))?;
        let spid = self.spid;
        let released = {
            let mut world = self.shared.world();
            let Some(session) = world.sessions.get(&spid) else { return Err(Stop::Ended) };
            let in_transaction = session.transactions > 0;
            let (resource, principal) = (text(&values[0]), text(&values[2]));
            owner(spid, &text(&values[1]), whose).and_then(|owner| {
                if matches!(owner, Owner::Transaction(_)) && !in_transaction {
                    return Err(no_transaction());
                }
                let key = key(&world, spid, &principal, &resource, whose)?;
                if !world.locks.release(&key, owner) {
                    let message = format!(
                        "Cannot release the application lock (Database Principal: '{principal}', Resource: \
                         '{resource}') because it is not currently held."
                    );
                    return Err(SqlError::new(1223, 16, message));
                }
                world.changed();
                Ok(())
            })
        };
        match released {
            Ok(()) => Ok(0),
            Err(error) => self.raise(error),
        }
    }

    /// `sp_executesql`, also as a client calls it.
    pub(super) async fn execute_sql(
        &mut self,
        arguments: Vec<(Option<String>, Value)>,
        depth: usize,
    ) -> Result<i32, Stop> {
        let mut arguments = arguments.into_iter();
        let text = arguments.next().map(|(_, value)| text(&value)).unwrap_or_default();
        let declared = arguments.next().map(|(_, value)| self::text(&value)).unwrap_or_default();
        let variables = self
            .shared
            .world()
            .cache
            .parameters(&declared)
            .map_err(|error| Stop::Error(SqlError::new(error.number, 15, error.message), None))?;
        let mut values = vec![None; variables.len()];
        for (place, (name, value)) in arguments.enumerate() {
            let place = match name.as_ref().filter(|name| !name.is_empty()) {
                Some(name) => variables.iter().position(|variable| variable.name.eq_ignore_ascii_case(name)),
                None => Some(place),
            };
            let Some(slot) = place.and_then(|place| values.get_mut(place)) else {
                let message = "Procedure or function  has too many arguments specified.";
                return Err(Stop::Error(SqlError::new(8144, 16, message), None));
            };
            *slot = Some(value);
        }
        let mut given = Vec::new();
        for (variable, value) in variables.iter().zip(values) {
            given.push(value.ok_or_else(|| {
                let message = format!(
                    "The parameterized query '{text}' expects the parameter '{}', which was not supplied.",
                    variable.name
                );
                Stop::Error(SqlError::new(8178, 16, message), None)
            })?);
        }
        Box::pin(self.run(&text, &declared, given, depth)).await
    }
}
