//! Expressions, and the rows that a query finds.

use super::locks::{Key, Mode, Owner, Spid};
use super::parse::{Column, Expression, Item, Name, Select};
use super::procedures;
use super::tokens::Heading;
use super::values::{self, KeyPart, RowKey, SqlError, Type, Value};
use super::world::{Session, Table, World};

/// Why a statement didn't come to its end.
#[derive(Debug)]
pub(super) enum Halt {
    Error(SqlError),
    /// The error was found when the statement was compiled, so that no TRY around it in the same batch catches it.
    Uncompiled(SqlError),
    /// It has to wait for a lock, and to begin again.
    Blocked(Key, Mode),
}

impl From<SqlError> for Halt {
    fn from(error: SqlError) -> Self {
        Self::Error(error)
    }
}

/// Rows, and the keys by which their table has them.
type Rows<'a> = Vec<(&'a RowKey, &'a Vec<Value>)>;

/// What an expression may refer to.
#[derive(Clone, Copy)]
pub(super) struct Environment<'a> {
    pub(super) world: &'a World,
    pub(super) spid: Spid,
    pub(super) variables: &'a [Value],
    pub(super) types: &'a [super::parse::Variable],
    /// The error that is being handled.
    pub(super) caught: Option<&'a SqlError>,
    pub(super) columns: Option<&'a [Column]>,
    pub(super) row: Option<&'a [Value]>,
    /// The row as it was before an update.
    pub(super) old: Option<&'a [Value]>,
    /// All rows, for aggregates.
    pub(super) group: Option<&'a Rows<'a>>,
}

fn unknown_column(name: &str) -> Halt {
    Halt::Uncompiled(SqlError::new(207, 16, format!("Invalid column name '{name}'.")))
}

fn unknown_function(name: &str) -> Halt {
    let message = format!("'{name}' is not a recognized built-in function name.");
    Halt::Error(SqlError::new(195, 15, message))
}

fn not_a_condition() -> Halt {
    let message = "An expression of non-boolean type specified in a context where a condition is expected.";
    Halt::Error(SqlError::new(4145, 15, message))
}

/// What a query has found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) headings: Vec<Heading>,
    pub(super) rows: Vec<Vec<Value>>,
    /// The rows whose locks stay, if the isolation level wants that.
    pub(super) read: Vec<Key>,
}

impl<'a> Environment<'a> {
    pub(super) fn session(&self) -> &'a Session {
        &self.world.sessions[&self.spid]
    }

    /// The value of an expression.
    pub(super) fn value(&self, expression: &Expression) -> Result<Value, Halt> {
        Ok(match expression {
            Expression::Literal(value) => value.clone(),
            Expression::Variable(number) => self.variables[*number].clone(),
            Expression::Global(name) => self.global(name)?,
            Expression::Column(name, old) => self.column(name, *old)?,
            Expression::Negate(value) => match self.value(value)? {
                Value::Null => Value::Null,
                Value::BigInt(value) => values::arithmetic('-', &Value::BigInt(0), &Value::BigInt(value))?,
                value => values::arithmetic('-', &Value::Int(0), &value)?,
            },
            Expression::Arithmetic(sign, left, right) => {
                let (left, right) = (self.value(left)?, self.value(right)?);
                if left.is_null() || right.is_null() {
                    Value::Null
                } else {
                    values::arithmetic(*sign, &left, &right)?
                }
            }
            Expression::Query(select) => {
                let mut found = self.select(select)?;
                match found.rows.len() {
                    0 => Value::Null,
                    1 if found.headings.len() == 1 => found.rows.remove(0).remove(0),
                    _ => {
                        let message = "Subquery returned more than 1 value. This is not permitted when the subquery \
                                       follows =, !=, <, <= , >, >= or when the subquery is used as an expression.";
                        return Err(SqlError::new(512, 16, message).into());
                    }
                }
            }
            Expression::Case(cases, otherwise) => {
                let of = self.type_of(expression).0;
                for (condition, value) in cases {
                    if self.truth(condition)? == Some(true) {
                        return Ok(self.value(value)?.cast(of)?);
                    }
                }
                match otherwise {
                    Some(value) => self.value(value)?.cast(of)?,
                    None => Value::Null,
                }
            }
            Expression::Cast(value, of) => self.value(value)?.cast(*of)?,
            Expression::Function(name, arguments) => self.function(name, arguments)?,
            Expression::Compare(..)
            | Expression::And(..)
            | Expression::Or(..)
            | Expression::Not(..)
            | Expression::IsNull(..)
            | Expression::In(..)
            | Expression::Exists(..) => {
                return Err(SqlError::new(102, 15, "Incorrect syntax near a condition.").into());
            }
        })
    }

    /// Whether a condition holds, which may be unknown.
    pub(super) fn truth(&self, condition: &Expression) -> Result<Option<bool>, Halt> {
        Ok(match condition {
            Expression::Compare(sign, left, right) => {
                let order = self.value(left)?.compare(&self.value(right)?)?;
                order.map(|order| match *sign {
                    "=" => order.is_eq(),
                    "<>" | "!=" => order.is_ne(),
                    "<" => order.is_lt(),
                    ">" => order.is_gt(),
                    "<=" | "!>" => order.is_le(),
                    _ => order.is_ge(),
                })
            }
            Expression::And(left, right) => match self.truth(left)? {
                Some(false) => Some(false),
                left => match (left, self.truth(right)?) {
                    (_, Some(false)) => Some(false),
                    (Some(true), Some(true)) => Some(true),
                    _ => None,
                },
            },
            Expression::Or(left, right) => match self.truth(left)? {
                Some(true) => Some(true),
                left => match (left, self.truth(right)?) {
                    (_, Some(true)) => Some(true),
                    (Some(false), Some(false)) => Some(false),
                    _ => None,
                },
            },
            Expression::Not(condition) => self.truth(condition)?.map(|truth| !truth),
            Expression::IsNull(value) => Some(self.value(value)?.is_null()),
            Expression::In(value, list) => {
                let value = self.value(value)?;
                let mut unknown = false;
                for other in list {
                    match value.compare(&self.value(other)?)? {
                        Some(order) if order.is_eq() => return Ok(Some(true)),
                        Some(_) => {}
                        None => unknown = true,
                    }
                }
                if unknown { None } else { Some(false) }
            }
            Expression::Exists(select) => Some(!self.select(select)?.rows.is_empty()),
            _ => return Err(not_a_condition()),
        })
    }

    fn column(&self, name: &str, old: bool) -> Result<Value, Halt> {
        let columns = self.columns.ok_or_else(|| unknown_column(name))?;
        let place = columns.iter().position(|column| column.name == name);
        let place = place.ok_or_else(|| unknown_column(name))?;
        let row = if old { self.old } else { self.row };
        Ok(row.map_or(Value::Null, |row| row[place].clone()))
    }

    fn global(&self, name: &str) -> Result<Value, Halt> {
        let session = self.session();
        let number = |count: i64| Value::Int(i32::try_from(count).unwrap_or(i32::MAX));
        Ok(match name {
            "@@spid" => Value::Int(self.spid.into()),
            "@@trancount" => number(session.transactions.into()),
            "@@rowcount" => number(session.row_count),
            "@@error" => number(session.last_error.into()),
            "@@lock_timeout" => Value::Int(session.settings.lock_timeout),
            "@@servername" => Value::text("SQLSERVER"),
            "@@version" => Value::text("Microsoft SQL Server 2022 (RTM) - 16.0.4185.3 (X64)"),
            name => {
                let message = format!("Must declare the scalar variable \"{name}\".");
                return Err(SqlError::new(137, 15, message).into());
            }
        })
    }

    #[expect(clippy::too_many_lines, reason = "each function has its line")]
    fn function(&self, name: &str, arguments: &[Expression]) -> Result<Value, Halt> {
        let wanted = match name {
            "applock_test" => 4..=4,
            "applock_mode" | "datediff" | "datediff_big" | "dateadd" => 3..=3,
            "isnull" | "datepart" | "nullif" => 2..=2,
            "object_id" => 1..=2,
            "db_name" | "db_id" | "suser_sname" | "user_name" | "count" => 0..=1,
            "max" | "min" | "sum" | "len" | "upper" | "lower" | "serverproperty" => 1..=1,
            "coalesce" | "concat" => 1..=usize::MAX,
            _ => 0..=0,
        };
        if !wanted.contains(&arguments.len()) {
            let message = format!("The {name} function requires {} argument(s).", wanted.start());
            return Err(SqlError::new(174, 15, message).into());
        }
        if matches!(name, "count" | "max" | "min" | "sum") {
            return self.aggregate(name, arguments.first());
        }
        if name == "coalesce" {
            let of = arguments.iter().map(|value| self.type_of(value).0).reduce(Type::with);
            for argument in arguments {
                let value = self.value(argument)?;
                if !value.is_null() {
                    return Ok(value.cast(of.expect("there is an argument"))?);
                }
            }
            return Ok(Value::Null);
        }
        let values = arguments.iter().map(|value| self.value(value)).collect::<Result<Vec<_>, _>>()?;
        let text = |place: usize| values.get(place).and_then(Value::to_text);
        let caught = |what: fn(&SqlError) -> Value| self.caught.map_or(Value::Null, what);
        Ok(match name {
            "applock_test" => procedures::applock_test(self, &values)?,
            "applock_mode" => procedures::applock_mode(self, &values)?,
            "sysutcdatetime" | "sysdatetime" | "getutcdate" => Value::Time(self.world.now() * 10),
            "datediff" | "datediff_big" => {
                let times = (values[1].cast(Type::DateTime2(7))?, values[2].cast(Type::DateTime2(7))?);
                let (Value::Time(from), Value::Time(to)) = times else { return Ok(Value::Null) };
                let unit = text(0).unwrap_or_default();
                let difference =
                    values::difference(&unit, from, to).ok_or_else(|| unknown_part(&unit, name))?;
                if name == "datediff_big" {
                    return Ok(Value::BigInt(difference));
                }
                Value::Int(i32::try_from(difference).map_err(|_| {
                    let message = "The datediff function resulted in an overflow. The number of dateparts separating \
                                   two date/time instances is too large. Try to use datediff with a less precise \
                                   datepart.";
                    SqlError::new(535, 16, message)
                })?)
            }
            "datepart" => {
                let Value::Time(time) = values[1].cast(Type::DateTime2(7))? else { return Ok(Value::Null) };
                let unit = text(0).unwrap_or_default();
                let part = values::part(&unit, time).ok_or_else(|| unknown_part(&unit, name))?;
                Value::Int(i32::try_from(part).expect("a part is small"))
            }
            "isnull" => {
                let of = self.type_of(&arguments[0]).0;
                if values[0].is_null() { values[1].cast(of)? } else { values[0].clone() }
            }
            "nullif" => match values[0].compare(&values[1])? {
                Some(order) if order.is_eq() => Value::Null,
                _ => values[0].clone(),
            },
            "object_id" => self.object_id(text(0).as_deref(), text(1).as_deref())?,
            "db_name" => match self.world.databases.get(&self.session().database) {
                Some(database) => Value::text(&database.name),
                None => Value::Null,
            },
            "db_id" => Value::Int(if &*self.session().database == super::world::MASTER { 1 } else { 5 }),
            "suser_sname" | "original_login" | "system_user" => Value::text(&self.session().login),
            "user_name" => {
                Value::text(if self.session().login == "sa" { "dbo" } else { &self.session().login })
            }
            "error_number" => caught(|error| i32::try_from(error.number).map_or(Value::Null, Value::Int)),
            "error_message" => caught(|error| Value::text(&error.message)),
            "error_severity" => caught(|error| Value::Int(error.class.into())),
            "error_state" => caught(|error| Value::Int(error.state.into())),
            "error_line" => caught(|_| Value::Int(1)),
            "error_procedure" => Value::Null,
            "xact_state" => {
                let session = self.session();
                Value::Int(match session.transactions {
                    0 => 0,
                    _ if session.doomed => -1,
                    _ => 1,
                })
            }
            "len" => match text(0) {
                Some(text) => {
                    let length = text.trim_end_matches(' ').encode_utf16().count();
                    Value::Int(i32::try_from(length).unwrap_or(i32::MAX))
                }
                None => Value::Null,
            },
            "upper" => text(0).map_or(Value::Null, |text| Value::text(&text.to_uppercase())),
            "lower" => text(0).map_or(Value::Null, |text| Value::text(&text.to_lowercase())),
            "concat" => {
                let parts = values.iter().filter_map(Value::to_text);
                Value::text(&parts.map(|part| part.to_string()).collect::<String>())
            }
            "serverproperty" => match text(0).map(|name| name.to_lowercase()).as_deref() {
                Some("productversion") => Value::text("16.0.4185.3"),
                Some("engineedition") => Value::Int(3),
                Some("edition") => Value::text("Developer Edition (64-bit)"),
                _ => Value::Null,
            },
            _ => return Err(unknown_function(name)),
        })
    }

    fn aggregate(&self, name: &str, argument: Option<&Expression>) -> Result<Value, Halt> {
        let group = self
            .group
            .ok_or_else(|| SqlError::new(147, 15, "An aggregate may not appear here.".to_owned()))?;
        let Some(argument) = argument else {
            return Ok(Value::Int(i32::try_from(group.len()).expect("rows are few")));
        };
        let mut found = Vec::new();
        for (_, row) in group {
            let value = Environment { row: Some(row), group: None, ..*self }.value(argument)?;
            if !value.is_null() {
                found.push(value);
            }
        }
        if name == "count" {
            return Ok(Value::Int(i32::try_from(found.len()).expect("rows are few")));
        }
        let mut result = Value::Null;
        for value in found {
            result = match (name, result.compare(&value)?) {
                (_, None) => value,
                ("sum", _) => values::arithmetic('+', &result, &value)?,
                ("max", Some(order)) if order.is_lt() => value,
                ("min", Some(order)) if order.is_gt() => value,
                _ => result,
            };
        }
        Ok(result)
    }

    fn object_id(&self, name: Option<&str>, kind: Option<&str>) -> Result<Value, Halt> {
        let Some(name) = name else { return Ok(Value::Null) };
        if kind.is_some_and(|kind| !kind.trim().eq_ignore_ascii_case("u")) {
            return Ok(Value::Null);
        }
        let name = name.replace(['[', ']'], "").to_lowercase();
        let parts: Vec<&str> = name.split('.').collect();
        let database = if parts.len() == 3 { parts[0].into() } else { self.session().database.clone() };
        let table = parts.last().expect("it has a part");
        if parts.len() > 1 && !matches!(parts[parts.len() - 2], "dbo" | "") {
            return Ok(Value::Null);
        }
        let key = Key::Table(database.clone(), (*table).into());
        if !self.world.locks.is_free_for(&key, Owner::Transaction(self.spid), Mode::IntentShared) {
            return Err(Halt::Blocked(key, Mode::IntentShared));
        }
        let found = self.world.databases.get(&database).and_then(|database| database.tables.get(*table));
        Ok(found.map_or(Value::Null, |table| Value::Int(table.id)))
    }

    /// The type of an expression, and whether it may be NULL.
    pub(super) fn type_of(&self, expression: &Expression) -> (Type, bool) {
        match expression {
            Expression::Literal(value) => (value.own_type(), value.is_null()),
            Expression::Variable(number) => (self.types[*number].of, true),
            Expression::Global(name) => match name.as_str() {
                "@@spid" => (Type::SmallInt, true),
                "@@servername" => (Type::NVarChar(128), true),
                "@@version" => (Type::NVarChar(300), true),
                _ => (Type::Int, true),
            },
            Expression::Column(name, _) => {
                let column = self.columns.unwrap_or_default().iter().find(|column| column.name == *name);
                column.map_or((Type::Int, true), |column| (column.of, column.nullable))
            }
            Expression::Negate(value) => (self.type_of(value).0, true),
            Expression::Arithmetic(_, left, right) => {
                let (left, right) = (self.type_of(left).0, self.type_of(right).0);
                let of = match left.with(right) {
                    Type::NVarChar(_) | Type::VarChar(_) => Type::NVarChar(4000),
                    of => of,
                };
                (of, true)
            }
            Expression::Query(select) => match &select.items[..] {
                [Item::Value(value, _)] => {
                    let columns = select.from.as_ref().and_then(|name| self.table(name).ok());
                    let columns = columns.map(|(_, table)| &table.columns[..]);
                    (Environment { columns, ..*self }.type_of(value).0, true)
                }
                _ => (Type::Int, true),
            },
            Expression::Case(cases, otherwise) => {
                let values = cases.iter().map(|(_, value)| value).chain(otherwise.as_deref());
                let known = values.filter(|value| !matches!(value, Expression::Literal(Value::Null)));
                let types: Vec<_> = known.map(|value| self.type_of(value)).collect();
                let of = types.iter().map(|(of, _)| *of).reduce(Type::with);
                (of.unwrap_or(Type::Int), true)
            }
            Expression::Cast(_, of) => (*of, true),
            Expression::Function(name, arguments) => (self.function_type(name, arguments), true),
            _ => (Type::Bit, true),
        }
    }

    fn function_type(&self, name: &str, arguments: &[Expression]) -> Type {
        let first = || arguments.first().map_or(Type::Int, |value| self.type_of(value).0);
        match name {
            "applock_test" | "xact_state" | "db_id" => Type::SmallInt,
            "applock_mode" => Type::NVarChar(32),
            "sysutcdatetime" | "sysdatetime" | "getutcdate" => Type::DateTime2(7),
            "datediff_big" => Type::BigInt,
            "isnull" | "nullif" | "max" | "min" | "sum" | "upper" | "lower" => first(),
            "coalesce" => {
                let known =
                    arguments.iter().filter(|value| !matches!(value, Expression::Literal(Value::Null)));
                known.map(|value| self.type_of(value).0).reduce(Type::with).unwrap_or(Type::Int)
            }
            "db_name" | "suser_sname" | "user_name" | "original_login" | "error_procedure"
            | "serverproperty" => Type::NVarChar(128),
            "error_message" | "concat" => Type::NVarChar(4000),
            _ => Type::Int,
        }
    }

    /// A table, and its database.
    pub(super) fn table(&self, name: &Name) -> Result<(std::sync::Arc<str>, &'a Table), Halt> {
        let database = match &name.database {
            Some(database) => database.as_str().into(),
            None => self.session().database.clone(),
        };
        let key = Key::Table(database.clone(), name.table.as_str().into());
        if !self.world.locks.is_free_for(&key, Owner::Transaction(self.spid), Mode::IntentShared) {
            return Err(Halt::Blocked(key, Mode::IntentShared));
        }
        let found = self.world.databases.get(&database).and_then(|database| database.tables.get(&name.table));
        let missing =
            || Halt::Uncompiled(SqlError::new(208, 16, format!("Invalid object name '{}'.", name.written)));
        Ok((database, found.ok_or_else(missing)?))
    }

    /// The rows of a table for which a condition may hold. If it names the whole key, no others are looked at.
    pub(super) fn candidates(&self, table: &'a Table, filter: Option<&Expression>) -> Result<Rows<'a>, Halt> {
        let keys: Vec<&str> =
            table.columns.iter().filter(|column| column.key).map(|column| column.name.as_str()).collect();
        let mut wanted: Vec<Option<KeyPart>> = vec![None; keys.len()];
        let mut open: Vec<&Expression> = filter.into_iter().collect();
        while let Some(condition) = open.pop() {
            match condition {
                Expression::And(left, right) => open.extend([&**left, &**right]),
                Expression::Compare("=", left, right) => {
                    let ((Expression::Column(name, _), value) | (value, Expression::Column(name, _))) =
                        (&**left, &**right)
                    else {
                        continue;
                    };
                    if !matches!(value, Expression::Literal(_) | Expression::Variable(_)) {
                        continue;
                    }
                    if let Some(place) = keys.iter().position(|key| key == name) {
                        let of =
                            table.columns.iter().find(|column| column.name == *name).expect("it's a key").of;
                        // A value out of the type's range equals none.
                        wanted[place] = self.value(value)?.cast(of).ok().map(|value| value.key());
                    }
                }
                _ => {}
            }
        }
        let key: Option<RowKey> = wanted.into_iter().collect();
        Ok(match key {
            Some(key) if !key.is_empty() => table.rows.get_key_value(&key).into_iter().collect(),
            _ => table.rows.iter().collect(),
        })
    }

    /// Carries out a query.
    pub(super) fn select(&self, select: &Select) -> Result<Found, Halt> {
        let mut found = Found::default();
        let Some(name) = &select.from else {
            let passes = match &select.filter {
                Some(filter) => self.truth(filter)? == Some(true),
                None => true,
            };
            found.headings = self.headings(&select.items);
            if passes {
                found.rows.push(self.items(&select.items)?);
            }
            return Ok(found);
        };
        let (database, table) = self.table(name)?;
        super::execute::check_right(self, "SELECT", name)?;
        let inner = Environment { columns: Some(&table.columns), ..*self };
        let mut rows = Vec::new();
        for (key, row) in self.candidates(table, select.filter.as_ref())? {
            let lock = Key::Row(database.clone(), name.table.as_str().into(), key.clone());
            let settings = self.session().settings;
            if settings.waits
                && !self.world.locks.is_free_for(&lock, Owner::Transaction(self.spid), Mode::Shared)
            {
                return Err(Halt::Blocked(lock, Mode::Shared));
            }
            let passes = match &select.filter {
                Some(filter) => Environment { row: Some(row), ..inner }.truth(filter)? == Some(true),
                None => true,
            };
            if passes {
                rows.push((key, row));
                if settings.keeps {
                    found.read.push(lock);
                }
            }
        }
        found.headings = inner.headings(&select.items);
        if select.items.iter().any(
            |item| matches!(item, Item::Value(value, _) | Item::Assign(_, value) if has_aggregate(value)),
        ) {
            found.rows.push(Environment { group: Some(&rows), ..inner }.items(&select.items)?);
            return Ok(found);
        }
        if rows.is_empty() {
            // Names are checked all the same.
            inner.items(&select.items)?;
        }
        if !select.order.is_empty() {
            let mut sorted = Vec::new();
            for row in rows {
                let environment = Environment { row: Some(row.1), ..inner };
                let by: Result<Vec<_>, _> =
                    select.order.iter().map(|(by, _)| environment.value(by)).collect();
                sorted.push((by?, row));
            }
            sorted.sort_by(|(one, _), (other, _)| {
                let pairs = one.iter().zip(other).zip(&select.order);
                pairs
                    .map(|((one, other), (_, descending))| {
                        let order = one.compare(other).ok().flatten();
                        let order = order.unwrap_or_else(|| other.is_null().cmp(&one.is_null()));
                        if *descending { order.reverse() } else { order }
                    })
                    .find(|order| order.is_ne())
                    .unwrap_or(std::cmp::Ordering::Equal)
            });
            rows = sorted.into_iter().map(|(_, row)| row).collect();
        }
        if let Some(top) = &select.top {
            let most = self.value(top)?.integer().unwrap_or_default();
            rows.truncate(usize::try_from(most).unwrap_or_default());
        }
        for (_, row) in rows {
            found.rows.push(Environment { row: Some(row), ..inner }.items(&select.items)?);
        }
        Ok(found)
    }

    fn items(&self, items: &[Item]) -> Result<Vec<Value>, Halt> {
        let mut row = Vec::new();
        for item in items {
            match item {
                Item::All => row.extend_from_slice(self.row.unwrap_or_default()),
                Item::Value(value, _) | Item::Assign(_, value) => row.push(self.value(value)?),
            }
        }
        Ok(row)
    }

    fn headings(&self, items: &[Item]) -> Vec<Heading> {
        let mut headings = Vec::new();
        for item in items {
            match item {
                Item::All => {
                    let columns = self.columns.unwrap_or_default().iter().cloned();
                    headings.extend(columns.map(|column| Heading {
                        name: column.name,
                        of: column.of,
                        nullable: column.nullable,
                    }));
                }
                Item::Value(value, name) => headings.push(self.heading(value, name)),
                Item::Assign(_, value) => headings.push(self.heading(value, "")),
            }
        }
        headings
    }

    /// The column of an answer that has this value.
    pub(super) fn heading(&self, value: &Expression, name: &str) -> Heading {
        let (of, nullable) = self.type_of(value);
        Heading { name: name.to_owned(), of, nullable }
    }
}

fn unknown_part(part: &str, function: &str) -> Halt {
    Halt::Error(SqlError::new(155, 15, format!("'{part}' is not a recognized {function} option.")))
}

fn has_aggregate(expression: &Expression) -> bool {
    match expression {
        Expression::Function(name, arguments) => {
            matches!(name.as_str(), "count" | "max" | "min" | "sum") || arguments.iter().any(has_aggregate)
        }
        Expression::Arithmetic(_, left, right) => has_aggregate(left) || has_aggregate(right),
        Expression::Cast(value, _) | Expression::Negate(value) => has_aggregate(value),
        _ => false,
    }
}
