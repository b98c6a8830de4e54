//! A Redis server, as far as the scripts use one: a store in memory, and Lua 5.1 which runs the real files.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use mlua::{Function, Lua, Value, Variadic};

/// More commands than this in one script: it doesn't end.
const MOST_COMMANDS: u32 = 1000;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Resp {
    Nil,
    Int(i64),
    Bulk(String),
    Status(&'static str),
    Array(Vec<Resp>),
}

#[derive(Clone, Debug)]
enum Data {
    Text(String),
    Hash(BTreeMap<String, String>),
    /// By score, then by member.
    Sorted(Vec<(f64, String)>),
}

#[derive(Clone, Debug)]
struct Entry {
    data: Data,
    expires: Option<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Store {
    /// The wall clock, in milliseconds, and how far into the present one it is.
    pub(crate) clock: u64,
    pub(crate) micros: u64,
    keys: BTreeMap<String, Entry>,
    /// The channel of each subscription.
    pub(crate) listening: Vec<String>,
    /// Channel and message.
    pub(crate) published: Vec<(String, String)>,
    commands: u32,
    swept_at: u64,
}

type Answer = Result<Resp, String>;

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("ERR {text:?} is not a number in range"))
}

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

impl Store {
    fn expire(&mut self) {
        let now = self.clock;
        if std::mem::replace(&mut self.swept_at, now) == now {
            return; // what has been set since then expires later
        }
        // As in Redis: the last millisecond still counts.
        self.keys.retain(|_, entry| entry.expires.is_none_or(|at| at >= now));
    }

    /// The names of the keys that there are.
    pub(crate) fn names(&mut self) -> Vec<String> {
        self.expire();
        self.keys.keys().cloned().collect()
    }

    /// The value of a plain key, and when it expires by the wall clock.
    pub(crate) fn text(&mut self, key: &str) -> Option<(String, Option<u64>)> {
        self.expire();
        match self.keys.get(key) {
            Some(Entry { data: Data::Text(text), expires }) => Some((text.clone(), *expires)),
            _ => None,
        }
    }

    pub(crate) fn delete(&mut self, key: &str) -> bool {
        self.expire();
        self.keys.remove(key).is_some()
    }

    fn hash(&mut self, key: &str, create: bool) -> Result<Option<&mut BTreeMap<String, String>>, String> {
        if create {
            let fresh = || Entry { data: Data::Hash(BTreeMap::new()), expires: None };
            self.keys.entry(key.to_owned()).or_insert_with(fresh);
        }
        match self.keys.get_mut(key) {
            None => Ok(None),
            Some(Entry { data: Data::Hash(hash), .. }) => Ok(Some(hash)),
            Some(_) => Err(WRONG_TYPE.to_owned()),
        }
    }

    fn sorted(&mut self, key: &str, create: bool) -> Result<Option<&mut Vec<(f64, String)>>, String> {
        if create {
            let fresh = || Entry { data: Data::Sorted(Vec::new()), expires: None };
            self.keys.entry(key.to_owned()).or_insert_with(fresh);
        }
        match self.keys.get_mut(key) {
            None => Ok(None),
            Some(Entry { data: Data::Sorted(sorted), .. }) => Ok(Some(sorted)),
            Some(_) => Err(WRONG_TYPE.to_owned()),
        }
    }

    /// Carries out one command.
    pub(crate) fn command(&mut self, args: &[String]) -> Answer {
        self.expire();
        self.commands += 1;
        if self.commands > MOST_COMMANDS {
            return Err("ERR the script doesn't end".to_owned());
        }
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        match args.as_slice() {
            ["TIME"] => {
                let micros = self.clock % 1000 * 1000 + self.micros;
                Ok(Resp::Array(vec![
                    Resp::Bulk((self.clock / 1000).to_string()),
                    Resp::Bulk(micros.to_string()),
                ]))
            }
            ["EXISTS", keys @ ..] if !keys.is_empty() => {
                Ok(count(keys.iter().filter(|&&key| self.keys.contains_key(key)).count()))
            }
            ["DEL", keys @ ..] if !keys.is_empty() => {
                Ok(count(keys.iter().filter(|&&key| self.keys.remove(key).is_some()).count()))
            }
            ["GET", key] => match self.keys.get(*key) {
                None => Ok(Resp::Nil),
                Some(Entry { data: Data::Text(text), .. }) => Ok(Resp::Bulk(text.clone())),
                Some(_) => Err(WRONG_TYPE.to_owned()),
            },
            ["SET", key, value, options @ ..] => self.set(key, value, options),
            ["PTTL", key] => Ok(Resp::Int(match self.keys.get(*key) {
                None => -2,
                Some(Entry { expires: None, .. }) => -1,
                Some(Entry { expires: Some(at), .. }) => {
                    i64::try_from(at - self.clock).expect("a short time")
                }
            })),
            ["PEXPIRE", key, ms] => {
                let at = self.clock + number::<u64>(ms)?;
                let entry = self.keys.get_mut(*key);
                Ok(count(entry.map(|entry| entry.expires = Some(at)).into_iter().count()))
            }
            ["PUBLISH", channel, message] => {
                self.published.push(((*channel).to_owned(), (*message).to_owned()));
                Ok(count(self.listening.iter().filter(|listening| listening == channel).count()))
            }
            [name, key, rest @ ..] if name.starts_with('Z') => self.sorted_command(name, key, rest),
            [name, key, rest @ ..] if name.starts_with('H') => self.hash_command(name, key, rest),
            _ => Err(format!("ERR unknown command or wrong arguments: {args:?}")),
        }
    }

    fn set(&mut self, key: &str, value: &str, mut options: &[&str]) -> Answer {
        let mut expires = None;
        loop {
            options = match options {
                [] => break,
                ["NX", rest @ ..] if self.keys.contains_key(key) => return drop_rest(rest),
                ["NX", rest @ ..] => rest,
                ["PX", ms, rest @ ..] if expires.is_none() => {
                    expires = Some(self.clock + positive(ms)?);
                    rest
                }
                ["EX", seconds, rest @ ..] if expires.is_none() => {
                    expires = Some(self.clock + positive(seconds)? * 1000);
                    rest
                }
                _ => return Err(format!("ERR syntax error: {options:?}")),
            };
        }
        self.keys.insert(key.to_owned(), Entry { data: Data::Text(value.to_owned()), expires });
        Ok(Resp::Status("OK"))
    }

    fn sorted_command(&mut self, name: &str, key: &str, args: &[&str]) -> Answer {
        let answer = match (name, args) {
            ("ZADD", [score, member]) => {
                let (score, sorted) = (number::<f64>(score)?, self.sorted(key, true)?);
                let sorted = sorted.expect("just created");
                let before = sorted.len();
                sorted.retain(|(_, other)| other != member);
                let new = before == sorted.len();
                sorted.push((score, (*member).to_owned()));
                sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
                Ok(Resp::Int(i64::from(new)))
            }
            ("ZREM", [member]) => {
                let Some(sorted) = self.sorted(key, false)? else { return Ok(Resp::Int(0)) };
                let before = sorted.len();
                sorted.retain(|(_, other)| other != member);
                Ok(count(before - sorted.len()))
            }
            ("ZSCORE", [member]) => {
                let Some(sorted) = self.sorted(key, false)? else { return Ok(Resp::Nil) };
                let found = sorted.iter().find(|(_, other)| other == member);
                Ok(found.map_or(Resp::Nil, |(score, _)| Resp::Bulk(score.to_string())))
            }
            ("ZRANGE", ["0", "0", with @ ..] | ["-1", "-1", with @ ..]) => {
                let Some(sorted) = self.sorted(key, false)? else { return Ok(Resp::Array(Vec::new())) };
                let found = if args[0] == "0" { sorted.first() } else { sorted.last() };
                let (score, member) = found.expect("an empty one vanishes");
                let mut answer = vec![Resp::Bulk(member.clone())];
                match with {
                    [] => {}
                    ["WITHSCORES"] => answer.push(Resp::Bulk(score.to_string())),
                    _ => return Err(format!("ERR syntax error: {with:?}")),
                }
                Ok(Resp::Array(answer))
            }
            _ => Err(format!("ERR unknown command or wrong arguments: {name} {args:?}")),
        };
        if self.sorted(key, false)?.is_some_and(|sorted| sorted.is_empty()) {
            self.keys.remove(key);
        }
        answer
    }

    fn hash_command(&mut self, name: &str, key: &str, args: &[&str]) -> Answer {
        let answer = match (name, args) {
            ("HSET", pairs) if !pairs.is_empty() && pairs.len() % 2 == 0 => {
                let hash = self.hash(key, true)?.expect("just created");
                let set = |pair: &[&str]| hash.insert(pair[0].to_owned(), pair[1].to_owned()).is_none();
                Ok(count(pairs.chunks(2).map(set).filter(|&new| new).count()))
            }
            ("HMGET", fields) if !fields.is_empty() => {
                let hash = self.hash(key, false)?;
                let get = |field: &&str| hash.as_ref().and_then(|hash| hash.get(*field)).cloned();
                Ok(Resp::Array(fields.iter().map(|field| get(field).map_or(Resp::Nil, Resp::Bulk)).collect()))
            }
            ("HGET", [field]) => {
                let Some(hash) = self.hash(key, false)? else { return Ok(Resp::Nil) };
                Ok(hash.get(*field).map_or(Resp::Nil, |value| Resp::Bulk(value.clone())))
            }
            ("HDEL", fields) if !fields.is_empty() => {
                let Some(hash) = self.hash(key, false)? else { return Ok(Resp::Int(0)) };
                Ok(count(fields.iter().filter(|&&field| hash.remove(field).is_some()).count()))
            }
            _ => Err(format!("ERR unknown command or wrong arguments: {name} {args:?}")),
        };
        if self.hash(key, false)?.is_some_and(|hash| hash.is_empty()) {
            self.keys.remove(key);
        }
        answer
    }
}

fn count(count: usize) -> Resp {
    Resp::Int(i64::try_from(count).expect("few"))
}

fn positive(text: &str) -> Result<u64, String> {
    number(text).and_then(|time| if time > 0 { Ok(time) } else { Err("ERR invalid expire time".to_owned()) })
}

/// `SET … NX` on a key that exists: the other options are still read.
fn drop_rest(rest: &[&str]) -> Answer {
    match rest {
        [] | ["PX" | "EX", _] => Ok(Resp::Nil),
        _ => Err(format!("ERR syntax error: {rest:?}")),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Script {
    Claim,
    Release,
    Transfer,
    Leave,
    Renew,
}

const SCRIPTS: [Script; 5] = [Script::Claim, Script::Release, Script::Transfer, Script::Leave, Script::Renew];

/// The files of `src/redis/scripts`.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    queue: String,
    claim: String,
    release: String,
    transfer: String,
    leave: String,
    renew: String,
}

impl Sources {
    pub(crate) fn real() -> Self {
        Self {
            queue: include_str!("../../src/redis/scripts/queue.lua").to_owned(),
            claim: include_str!("../../src/redis/scripts/claim.lua").to_owned(),
            release: include_str!("../../src/redis/scripts/release.lua").to_owned(),
            transfer: include_str!("../../src/redis/scripts/transfer.lua").to_owned(),
            leave: include_str!("../../src/redis/scripts/leave.lua").to_owned(),
            renew: include_str!("../../src/redis/scripts/renew.lua").to_owned(),
        }
    }

    /// Breaks a script: `from` must be in it once.
    pub(crate) fn replace(mut self, file: &str, from: &str, to: &str) -> Self {
        let source = match file {
            "queue" => &mut self.queue,
            "claim" => &mut self.claim,
            "release" => &mut self.release,
            "transfer" => &mut self.transfer,
            "leave" => &mut self.leave,
            "renew" => &mut self.renew,
            _ => panic!("no script {file}"),
        };
        assert_eq!(source.matches(from).count(), 1, "{from:?} has to be in {file}.lua exactly once");
        *source = source.replace(from, to);
        self
    }

    /// As `src/redis/script.rs` puts them together.
    fn of(&self, script: Script) -> String {
        match script {
            Script::Claim => [&*self.queue, &self.claim].concat(),
            Script::Release => [&*self.queue, &self.release].concat(),
            Script::Transfer => [&*self.queue, &self.transfer].concat(),
            Script::Leave => [&*self.queue, &self.leave].concat(),
            Script::Renew => self.renew.clone(),
        }
    }
}

pub(crate) struct Server {
    lua: Lua,
    scripts: Vec<Function>,
    pub(crate) store: Rc<RefCell<Store>>,
}

impl Server {
    pub(crate) fn new(sources: &Sources) -> Self {
        Self::of(&SCRIPTS.map(|script| sources.of(script)))
    }

    /// With these scripts, of which each is called by its place.
    pub(crate) fn of(scripts: &[String]) -> Self {
        let (lua, store) = (Lua::new(), Rc::new(RefCell::new(Store::default())));
        let scripts = prepare(&lua, &store, scripts).expect("the scripts are Lua");
        Self { lua, scripts, store }
    }

    /// Empty, at a time.
    pub(crate) fn reset(&self, clock: u64) {
        *self.store.borrow_mut() = Store { clock, ..Store::default() };
    }

    pub(crate) fn eval(&self, script: Script, keys: &[String], args: &[String]) -> Answer {
        self.run(SCRIPTS.iter().position(|&other| other == script).expect("all are there"), keys, args)
    }

    pub(crate) fn run(&self, script: usize, keys: &[String], args: &[String]) -> Answer {
        self.store.borrow_mut().commands = 0;
        let run = || -> mlua::Result<Resp> {
            let globals = self.lua.globals();
            globals.raw_set("KEYS", self.lua.create_sequence_from(keys.iter().map(String::as_str))?)?;
            globals.raw_set("ARGV", self.lua.create_sequence_from(args.iter().map(String::as_str))?)?;
            from_lua(&self.scripts[script].call(())?)
        };
        run().map_err(|error| error.to_string())
    }
}

fn prepare(lua: &Lua, store: &Rc<RefCell<Store>>, scripts: &[String]) -> mlua::Result<Vec<Function>> {
    let redis = lua.create_table()?;
    let to = store.clone();
    let call = move |lua: &Lua, args: Variadic<Value>| {
        let answer = to.borrow_mut().command(&arguments(&args)?);
        to_lua(lua, &answer.map_err(mlua::Error::runtime)?)
    };
    redis.set("call", lua.create_function(call)?)?;
    let to = store.clone();
    let pcall = move |lua: &Lua, args: Variadic<Value>| {
        let answer = to.borrow_mut().command(&arguments(&args)?);
        answer.map_or_else(|error| one_field(lua, "err", &error), |answer| to_lua(lua, &answer))
    };
    redis.set("pcall", lua.create_function(pcall)?)?;
    lua.globals().set("redis", redis)?;
    // Redis lets no script use a global that isn't there.
    lua.load(
        "setmetatable(_G, {__newindex = function(_, name) error('a global is set: ' .. name) end,
                           __index = function(_, name) error('no such global: ' .. name) end})",
    )
    .exec()?;
    scripts.iter().map(|script| lua.load(script).into_function()).collect()
}

fn arguments(args: &[Value]) -> mlua::Result<Vec<String>> {
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.to_str()?.to_owned()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(mlua::Error::runtime("a command's arguments must be strings or integers")),
    };
    args.iter().map(text).collect()
}

fn one_field(lua: &Lua, name: &str, value: &str) -> mlua::Result<Value> {
    let table = lua.create_table()?;
    table.set(name, value)?;
    Ok(Value::Table(table))
}

fn to_lua(lua: &Lua, answer: &Resp) -> mlua::Result<Value> {
    Ok(match answer {
        Resp::Nil => Value::Boolean(false),
        Resp::Int(number) => Value::Integer(*number),
        Resp::Bulk(text) => Value::String(lua.create_string(text)?),
        Resp::Status(text) => one_field(lua, "ok", text)?,
        Resp::Array(all) => {
            let all: Vec<_> = all.iter().map(|one| to_lua(lua, one)).collect::<mlua::Result<_>>()?;
            Value::Table(lua.create_sequence_from(all)?)
        }
    })
}

fn from_lua(value: &Value) -> mlua::Result<Resp> {
    Ok(match value {
        Value::Nil | Value::Boolean(false) => Resp::Nil,
        Value::Boolean(true) => Resp::Int(1),
        Value::Integer(number) => Resp::Int(*number),
        // Cut off, as Redis does.
        Value::Number(number) => Resp::Int(number.trunc().to_string().parse().map_err(mlua::Error::runtime)?),
        Value::String(text) => Resp::Bulk(text.to_str()?.to_owned()),
        Value::Table(table) => {
            let mut all = Vec::new();
            for index in 1.. {
                match table.raw_get(index)? {
                    Value::Nil => break,
                    value => all.push(from_lua(&value)?),
                }
            }
            Resp::Array(all)
        }
        _ => return Err(mlua::Error::runtime("an answer of a type that Redis can't send")),
    })
}
