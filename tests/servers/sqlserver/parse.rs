//! From the text of a batch to its statements: the part of Transact-SQL that is understood here.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::values::{Type, Value};

/// An error of the syntax, or an unknown variable: nothing of the batch is carried out.
#[derive(Clone, Debug)]
pub(super) struct ParseError {
    pub(super) number: u32,
    pub(super) message: String,
}

/// A batch that can be carried out. Variables are numbered, its parameters first.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) text: String,
    pub(super) statements: Vec<Statement>,
    pub(super) variables: Vec<Variable>,
}

#[derive(Clone, Debug)]
pub(super) struct Variable {
    /// In lower case, with its `@`.
    pub(super) name: String,
    pub(super) of: Type,
}

#[derive(Debug)]
pub(super) struct Statement {
    /// Where it is in the text of the batch.
    pub(super) span: Range<usize>,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Nothing,
    Assign(Vec<(usize, Expression)>),
    Set(Setting),
    If(Expression, Box<Statement>, Option<Box<Statement>>),
    While(Expression, Box<Statement>),
    Break,
    Continue,
    Block(Vec<Statement>),
    Try(Vec<Statement>, Vec<Statement>),
    Return(Option<Expression>),
    Execute(Call),
    ExecuteText(Vec<Expression>),
    Select(Select),
    Update(Update),
    Insert(Insert),
    Delete(Name, Option<Expression>),
    CreateTable(Name, Vec<Column>),
    DropTable(Name, bool),
    CreateDatabase(String),
    DropDatabase(String),
    Use(String),
    Begin,
    Commit,
    Rollback,
    Kill(Expression),
    Print(Expression),
    /// Number, message, state; or the error that is being handled.
    Throw(Option<(Expression, Expression, Expression)>),
    /// Message, class, state.
    RaiseError(Expression, Expression, Expression),
    /// For so long.
    WaitFor(Expression),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Setting {
    NoCount(bool),
    AbortTransactions(bool),
    ImplicitTransactions(bool),
    LockTimeout(i32),
    /// Whether rows that were read stay locked, and whether reading waits for writers.
    Isolation {
        keeps: bool,
        waits: bool,
    },
    Other,
}

#[derive(Debug)]
pub(super) struct Call {
    /// The variable that gets the status.
    pub(super) result: Option<usize>,
    pub(super) procedure: String,
    pub(super) arguments: Vec<Argument>,
}

#[derive(Debug)]
pub(super) struct Argument {
    /// In lower case, with its `@`.
    pub(super) name: Option<String>,
    pub(super) value: Expression,
}

/// The name of a table, in lower case, perhaps with its database, and as it was written.
#[derive(Clone, Debug)]
pub(super) struct Name {
    pub(super) database: Option<String>,
    pub(super) table: String,
    pub(super) written: String,
}

#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) of: Type,
    pub(super) nullable: bool,
    pub(super) key: bool,
}

#[derive(Debug)]
pub(super) struct Select {
    pub(super) items: Vec<Item>,
    pub(super) from: Option<Name>,
    pub(super) filter: Option<Expression>,
    pub(super) order: Vec<(Expression, bool)>,
    pub(super) top: Option<Expression>,
}

#[derive(Debug)]
pub(super) enum Item {
    All,
    Value(Expression, String),
    Assign(usize, Expression),
}

#[derive(Debug)]
pub(super) struct Update {
    pub(super) table: Name,
    pub(super) changes: Vec<Change>,
    pub(super) output: Vec<(Expression, String)>,
    pub(super) filter: Option<Expression>,
}

/// `variable = column = value`, of which one on the left may be missing.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) variable: Option<usize>,
    pub(super) column: Option<String>,
    pub(super) value: Expression,
}

#[derive(Debug)]
pub(super) struct Insert {
    pub(super) table: Name,
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Vec<Expression>>,
    pub(super) from: Option<Select>,
    pub(super) output: Vec<(Expression, String)>,
}

#[derive(Debug)]
pub(super) enum Expression {
    Literal(Value),
    Variable(usize),
    /// Lower case, such as `@@spid`.
    Global(String),
    /// Lower case; whether it is the row before it was changed.
    Column(String, bool),
    Negate(Box<Expression>),
    Arithmetic(char, Box<Expression>, Box<Expression>),
    Compare(&'static str, Box<Expression>, Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
    Not(Box<Expression>),
    IsNull(Box<Expression>),
    In(Box<Expression>, Vec<Expression>),
    Exists(Box<Select>),
    Query(Box<Select>),
    Case(Vec<(Expression, Expression)>, Option<Box<Expression>>),
    Cast(Box<Expression>, Type),
    /// Lower case; the first argument of `DATEDIFF` and `DATEPART` is a string.
    Function(String, Vec<Expression>),
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Quoted(String),
    Text(String),
    Number(String),
    Variable(String),
    Symbol(&'static str),
    End,
}

const SYMBOLS: [&str; 22] = [
    "<=", ">=", "<>", "!=", "+=", "-=", "!<", "!>", "<", ">", "=", "+", "-", "*", "/", "%", "(", ")", ",",
    ";", ".", "&",
];

/// Words that begin a statement, or continue one, so that they can't be the name of something.
const RESERVED: [&str; 51] = [
    "and",
    "as",
    "asc",
    "begin",
    "break",
    "by",
    "case",
    "commit",
    "continue",
    "create",
    "declare",
    "delete",
    "desc",
    "drop",
    "else",
    "end",
    "exec",
    "execute",
    "exists",
    "from",
    "if",
    "in",
    "insert",
    "into",
    "is",
    "kill",
    "like",
    "not",
    "null",
    "on",
    "or",
    "order",
    "output",
    "print",
    "raiserror",
    "return",
    "rollback",
    "save",
    "select",
    "set",
    "table",
    "then",
    "top",
    "tran",
    "transaction",
    "update",
    "use",
    "values",
    "waitfor",
    "when",
    "while",
];

fn is_reserved(word: &str) -> bool {
    let word = word.to_ascii_lowercase();
    RESERVED.contains(&word.as_str()) || word == "where"
}

/// Parses a batch whose parameters are declared outside.
pub(super) fn batch(text: &str, parameters: &[Variable]) -> Result<Batch, ParseError> {
    let mut parser = Parser::new(text)?;
    for parameter in parameters {
        parser.declare(parameter.name.clone(), parameter.of);
    }
    let mut statements = Vec::new();
    while *parser.peek() != Token::End {
        if parser.symbol(";") {
            continue;
        }
        statements.push(parser.statement()?);
    }
    Ok(Batch { text: text.to_owned(), statements, variables: parser.variables })
}

/// Parses the declarations that `sp_executesql` gets.
pub(super) fn parameters(text: &str) -> Result<Vec<Variable>, ParseError> {
    let mut parser = Parser::new(text)?;
    while let Token::Variable(name) = parser.peek().clone() {
        parser.next();
        parser.word("as");
        let of = parser.data_type()?;
        if parser.symbol("=") {
            parser.additive()?;
        }
        if !parser.word("output") {
            parser.word("out");
        }
        parser.declare(name, of);
        if !parser.symbol(",") {
            break;
        }
    }
    parser.expect_end()?;
    Ok(parser.variables)
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<(Token, Range<usize>)>,
    place: usize,
    variables: Vec<Variable>,
    numbers: HashMap<String, usize>,
}

fn tokens(text: &str) -> Result<Vec<(Token, Range<usize>)>, ParseError> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut at = 0;
    let word_end = |from: usize| {
        text[from..]
            .find(|letter: char| !letter.is_alphanumeric() && !matches!(letter, '_' | '@' | '#' | '$'))
            .map_or(text.len(), |length| from + length)
    };
    while at < bytes.len() {
        let start = at;
        let rest = &text[at..];
        let first = rest.chars().next().expect("it isn't the end");
        if first.is_whitespace() || first == '\u{feff}' {
            at += first.len_utf8();
            continue;
        }
        if rest.starts_with("--") {
            at = rest.find('\n').map_or(text.len(), |length| at + length);
            continue;
        }
        if rest.starts_with("/*") {
            at = comment_end(text, at)?;
            continue;
        }
        let national = rest.starts_with("N'") || rest.starts_with("n'");
        let token = if first == '\'' || national {
            let (value, end) = quoted(text, at + usize::from(national), '\'')?;
            at = end;
            Token::Text(value)
        } else if first == '[' || first == '"' {
            let (value, end) = quoted(text, at, if first == '[' { ']' } else { '"' })?;
            at = end;
            Token::Quoted(value)
        } else if first.is_ascii_digit() {
            at +=
                rest.find(|digit: char| !digit.is_ascii_alphanumeric() && digit != '.').unwrap_or(rest.len());
            Token::Number(text[start..at].to_owned())
        } else if first == '@' {
            at = word_end(at);
            Token::Variable(text[start..at].to_lowercase())
        } else if first.is_alphabetic() || matches!(first, '_' | '#') {
            at = word_end(at);
            Token::Word(text[start..at].to_owned())
        } else if let Some(symbol) = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol)) {
            at += symbol.len();
            Token::Symbol(symbol)
        } else {
            return Err(near(&first.to_string()));
        };
        tokens.push((token, start..at));
    }
    tokens.push((Token::End, text.len()..text.len()));
    Ok(tokens)
}

/// Comments may contain others.
fn comment_end(text: &str, start: usize) -> Result<usize, ParseError> {
    let (mut at, mut depth) = (start, 0);
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return Ok(at);
            }
        } else {
            at += 1;
        }
    }
    Err(ParseError { number: 113, message: "Missing end comment mark '*/'.".to_owned() })
}

/// What is in quotes that begin at `start`, and where they end.
fn quoted(text: &str, start: usize, quote: char) -> Result<(String, usize), ParseError> {
    let mut value = String::new();
    let mut letters = text[start + 1..].char_indices().peekable();
    while let Some((place, letter)) = letters.next() {
        if letter != quote {
            value.push(letter);
        } else if letters.next_if(|(_, next)| *next == quote).is_some() {
            value.push(quote);
        } else {
            return Ok((value, start + 1 + place + 1));
        }
    }
    let message = format!("Unclosed quotation mark after the character string '{value}'.");
    Err(ParseError { number: 105, message })
}

fn near(what: &str) -> ParseError {
    ParseError { number: 102, message: format!("Incorrect syntax near '{what}'.") }
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Result<Self, ParseError> {
        let tokens = tokens(text)?;
        Ok(Self { text, tokens, place: 0, variables: Vec::new(), numbers: HashMap::new() })
    }

    fn declare(&mut self, name: String, of: Type) -> usize {
        let number = self.variables.len();
        self.numbers.insert(name.clone(), number);
        self.variables.push(Variable { name, of });
        number
    }

    fn variable(&self, name: &str) -> Result<usize, ParseError> {
        self.numbers.get(name).copied().ok_or_else(|| ParseError {
            number: 137,
            message: format!("Must declare the scalar variable \"{name}\"."),
        })
    }

    fn peek(&self) -> &Token {
        &self.tokens[self.place].0
    }

    fn peek_after(&self, count: usize) -> &Token {
        &self.tokens[(self.place + count).min(self.tokens.len() - 1)].0
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.place = (self.place + 1).min(self.tokens.len() - 1);
        token
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Token::Word(found) if found.eq_ignore_ascii_case(word))
    }

    fn is_word_after(&self, count: usize, word: &str) -> bool {
        matches!(self.peek_after(count), Token::Word(found) if found.eq_ignore_ascii_case(word))
    }

    fn word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.next();
        }
        found
    }

    fn any_word(&mut self, words: &[&str]) -> bool {
        words.iter().any(|word| self.word(word))
    }

    fn is_symbol(&self, symbol: &str) -> bool {
        matches!(self.peek(), Token::Symbol(found) if *found == symbol)
    }

    fn symbol(&mut self, symbol: &str) -> bool {
        let found = self.is_symbol(symbol);
        if found {
            self.next();
        }
        found
    }

    fn wrong(&self) -> ParseError {
        let span = self.tokens[self.place].1.clone();
        let last = self.tokens[self.place.saturating_sub(1)].1.clone();
        match self.peek() {
            Token::End => near(&self.text[last]),
            Token::Word(word) if is_reserved(word) => {
                ParseError { number: 156, message: format!("Incorrect syntax near the keyword '{word}'.") }
            }
            _ => near(&self.text[span]),
        }
    }

    fn expect(&mut self, symbol: &str) -> Result<(), ParseError> {
        if self.symbol(symbol) { Ok(()) } else { Err(self.wrong()) }
    }

    fn expect_word(&mut self, word: &str) -> Result<(), ParseError> {
        if self.word(word) { Ok(()) } else { Err(self.wrong()) }
    }

    fn expect_end(&self) -> Result<(), ParseError> {
        if *self.peek() == Token::End { Ok(()) } else { Err(self.wrong()) }
    }

    fn identifier(&mut self) -> Result<String, ParseError> {
        match self.peek().clone() {
            Token::Quoted(name) => {
                self.next();
                Ok(name)
            }
            Token::Word(name) if !is_reserved(&name) => {
                self.next();
                Ok(name)
            }
            _ => Err(self.wrong()),
        }
    }

    fn name(&mut self) -> Result<Name, ParseError> {
        let start = self.tokens[self.place].1.start;
        let mut parts = vec![self.identifier()?];
        while self.symbol(".") {
            parts.push(if self.is_symbol(".") { String::new() } else { self.identifier()? });
        }
        let end = self.tokens[self.place - 1].1.end;
        let written = self.text[start..end].replace(['[', ']'], "");
        let table = parts.pop().expect("there is one").to_lowercase();
        let database = if parts.len() > 1 { parts.first().map(|name| name.to_lowercase()) } else { None };
        Ok(Name { database, table, written })
    }

    fn list<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, ParseError>,
    ) -> Result<Vec<T>, ParseError> {
        let mut items = vec![item(self)?];
        while self.symbol(",") {
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn data_type(&mut self) -> Result<Type, ParseError> {
        let name = self.identifier()?.to_lowercase();
        let name = if name == "sys" && self.symbol(".") { self.identifier()?.to_lowercase() } else { name };
        let mut size = None;
        if self.symbol("(") {
            size = match self.next() {
                Token::Number(digits) => Some(digits.parse::<u16>().map_err(|_| near(&digits))?),
                Token::Word(word) if word.eq_ignore_ascii_case("max") => Some(0),
                _ => return Err(self.wrong()),
            };
            self.expect(")")?;
        }
        Type::named(&name, size).ok_or_else(|| ParseError {
            number: 2715,
            message: format!("Column, parameter, or variable #1: Cannot find data type {name}."),
        })
    }

    fn statement(&mut self) -> Result<Statement, ParseError> {
        let start = self.tokens[self.place].1.start;
        let kind = self.kind()?;
        let end = self.tokens[self.place.saturating_sub(1)].1.end;
        while self.symbol(";") {}
        Ok(Statement { span: start..end, kind })
    }

    fn kind(&mut self) -> Result<Kind, ParseError> {
        let Token::Word(word) = self.peek().clone() else { return Err(self.wrong()) };
        let word = word.to_ascii_lowercase();
        let first = self.place;
        self.next();
        Ok(match word.as_str() {
            "declare" => Kind::Assign(self.declarations()?),
            "set" => return self.set(),
            "if" => {
                let condition = self.condition()?;
                let then = Box::new(self.statement()?);
                let otherwise = if self.word("else") { Some(Box::new(self.statement()?)) } else { None };
                Kind::If(condition, then, otherwise)
            }
            "while" => Kind::While(self.condition()?, Box::new(self.statement()?)),
            "break" => Kind::Break,
            "continue" => Kind::Continue,
            "begin" => return self.begin(),
            "return" => Kind::Return(if self.begins_expression() { Some(self.additive()?) } else { None }),
            "exec" | "execute" => return self.execute(),
            "select" => Kind::Select(self.select()?),
            "update" => Kind::Update(self.update()?),
            "insert" => Kind::Insert(self.insert()?),
            "delete" => {
                self.word("from");
                let table = self.name()?;
                Kind::Delete(table, self.filter()?)
            }
            "create" if self.word("table") => {
                let table = self.name()?;
                Kind::CreateTable(table, self.columns()?)
            }
            "create" if self.word("database") => Kind::CreateDatabase(self.identifier()?),
            "drop" if self.word("table") => {
                let lenient = self.if_exists()?;
                Kind::DropTable(self.name()?, lenient)
            }
            "drop" if self.word("database") => {
                self.if_exists()?;
                Kind::DropDatabase(self.identifier()?)
            }
            "use" => Kind::Use(self.identifier()?),
            "commit" => {
                self.transaction_name();
                Kind::Commit
            }
            "rollback" => {
                self.transaction_name();
                Kind::Rollback
            }
            "kill" => Kind::Kill(self.additive()?),
            "print" => Kind::Print(self.additive()?),
            "throw" if self.begins_expression() => {
                let number = self.additive()?;
                self.expect(",")?;
                let message = self.additive()?;
                self.expect(",")?;
                Kind::Throw(Some((number, message, self.additive()?)))
            }
            "throw" => Kind::Throw(None),
            "raiserror" => {
                self.expect("(")?;
                let message = self.additive()?;
                self.expect(",")?;
                let class = self.additive()?;
                self.expect(",")?;
                let state = self.additive()?;
                self.expect(")")?;
                Kind::RaiseError(message, class, state)
            }
            "waitfor" => {
                self.expect_word("delay")?;
                Kind::WaitFor(self.additive()?)
            }
            // The first statement of a batch may be the bare name of a procedure.
            _ if first == 0 && !is_reserved(&word) => {
                self.place = first;
                return self.execute();
            }
            _ => {
                self.place = first;
                return Err(near(&self.text[self.tokens[first].1.clone()]));
            }
        })
    }

    fn if_exists(&mut self) -> Result<bool, ParseError> {
        let lenient = self.word("if");
        if lenient {
            self.expect_word("exists")?;
        }
        Ok(lenient)
    }

    fn begins_expression(&self) -> bool {
        match self.peek() {
            Token::Text(_) | Token::Number(_) | Token::Variable(_) => true,
            Token::Symbol(symbol) => matches!(*symbol, "-" | "(" | "+"),
            Token::Word(word) => matches!(self.peek_after(1), Token::Symbol("(")) && !is_reserved(word),
            _ => false,
        }
    }

    fn declarations(&mut self) -> Result<Vec<(usize, Expression)>, ParseError> {
        let mut assigned = Vec::new();
        self.list(|parser| {
            let Token::Variable(name) = parser.next() else {
                parser.place -= 1;
                return Err(parser.wrong());
            };
            parser.word("as");
            let of = parser.data_type()?;
            if parser.numbers.contains_key(&name) {
                let message = format!(
                    "The variable name '{name}' has already been declared. Variable names must be unique within a \
                     query batch or stored procedure."
                );
                return Err(ParseError { number: 134, message });
            }
            let value = if parser.symbol("=") { Some(parser.additive()?) } else { None };
            let number = parser.declare(name, of);
            assigned.extend(value.map(|value| (number, value)));
            Ok(())
        })?;
        Ok(assigned)
    }

    fn set(&mut self) -> Result<Kind, ParseError> {
        if let Token::Variable(name) = self.peek().clone() {
            self.next();
            let number = self.variable(&name)?;
            let value = if self.symbol("+=") {
                Expression::Arithmetic(
                    '+',
                    Box::new(Expression::Variable(number)),
                    Box::new(self.additive()?),
                )
            } else if self.symbol("-=") {
                Expression::Arithmetic(
                    '-',
                    Box::new(Expression::Variable(number)),
                    Box::new(self.additive()?),
                )
            } else {
                self.expect("=")?;
                self.additive()?
            };
            return Ok(Kind::Assign(vec![(number, value)]));
        }
        let option = self.any_identifier()?.to_lowercase();
        Ok(Kind::Set(match option.as_str() {
            "nocount" => Setting::NoCount(self.switch()?),
            "xact_abort" => Setting::AbortTransactions(self.switch()?),
            "implicit_transactions" => Setting::ImplicitTransactions(self.switch()?),
            "lock_timeout" => {
                let negative = self.symbol("-");
                let Token::Number(digits) = self.next() else {
                    self.place -= 1;
                    return Err(self.wrong());
                };
                let timeout: i32 = digits.parse().map_err(|_| near(&digits))?;
                Setting::LockTimeout(if negative { -timeout } else { timeout })
            }
            "transaction" => {
                self.expect_word("isolation")?;
                self.expect_word("level")?;
                let (keeps, waits) = if self.word("serializable") {
                    (true, true)
                } else if self.word("snapshot") {
                    (false, false)
                } else if self.word("repeatable") {
                    self.expect_word("read")?;
                    (true, true)
                } else {
                    self.expect_word("read")?;
                    let committed = self.word("committed");
                    if !committed {
                        self.expect_word("uncommitted")?;
                    }
                    (false, committed)
                };
                Setting::Isolation { keeps, waits }
            }
            "ansi_nulls"
            | "ansi_padding"
            | "ansi_warnings"
            | "arithabort"
            | "concat_null_yields_null"
            | "quoted_identifier"
            | "cursor_close_on_commit"
            | "numeric_roundabort"
            | "ansi_null_dflt_on" => {
                self.switch()?;
                Setting::Other
            }
            "deadlock_priority" | "textsize" | "language" | "dateformat" | "datefirst" => {
                self.symbol("-");
                self.next();
                Setting::Other
            }
            other => {
                let message = format!("'{other}' is not a recognized SET option.");
                return Err(ParseError { number: 195, message });
            }
        }))
    }

    fn any_identifier(&mut self) -> Result<String, ParseError> {
        match self.next() {
            Token::Word(word) | Token::Quoted(word) => Ok(word),
            _ => {
                self.place -= 1;
                Err(self.wrong())
            }
        }
    }

    fn switch(&mut self) -> Result<bool, ParseError> {
        if self.word("on") {
            return Ok(true);
        }
        self.expect_word("off")?;
        Ok(false)
    }

    fn transaction_name(&mut self) {
        if !self.word("work") && self.any_word(&["tran", "transaction"]) {
            match self.peek() {
                Token::Quoted(_) | Token::Variable(_) => {
                    self.next();
                }
                Token::Word(word) if !is_reserved(word) && !word.eq_ignore_ascii_case("throw") => {
                    self.next();
                }
                _ => {}
            }
        }
    }

    fn begin(&mut self) -> Result<Kind, ParseError> {
        if self.is_word("tran") || self.is_word("transaction") {
            self.transaction_name();
            return Ok(Kind::Begin);
        }
        if self.word("try") {
            let body = self.statements_until("try")?;
            self.expect_word("begin")?;
            self.expect_word("catch")?;
            return Ok(Kind::Try(body, self.statements_until("catch")?));
        }
        let mut statements = Vec::new();
        while !self.word("end") {
            statements.push(self.statement_in_block()?);
        }
        if statements.is_empty() {
            return Err(near("end"));
        }
        Ok(Kind::Block(statements))
    }

    fn statement_in_block(&mut self) -> Result<Statement, ParseError> {
        if self.symbol(";") {
            let at = self.tokens[self.place].1.start;
            return Ok(Statement { span: at..at, kind: Kind::Nothing });
        }
        self.statement()
    }

    fn statements_until(&mut self, word: &str) -> Result<Vec<Statement>, ParseError> {
        let mut statements = Vec::new();
        while !(self.is_word("end") && self.is_word_after(1, word)) {
            statements.push(self.statement_in_block()?);
        }
        self.next();
        self.next();
        Ok(statements)
    }

    fn execute(&mut self) -> Result<Kind, ParseError> {
        if self.symbol("(") {
            let mut parts = vec![self.constant()?];
            while self.symbol("+") {
                parts.push(self.constant()?);
            }
            self.expect(")")?;
            return Ok(Kind::ExecuteText(parts));
        }
        let mut result = None;
        if let Token::Variable(name) = self.peek().clone() {
            self.next();
            result = Some(self.variable(&name)?);
            self.expect("=")?;
        }
        let procedure = self.name()?.table;
        let mut arguments = Vec::new();
        while self.begins_argument() {
            let mut name = None;
            if let (Token::Variable(variable), Token::Symbol("=")) = (self.peek().clone(), self.peek_after(1))
            {
                self.next();
                self.next();
                name = Some(variable);
            }
            arguments.push(Argument { name, value: self.constant()? });
            if !self.word("output") {
                self.word("out");
            }
            if !self.symbol(",") {
                break;
            }
        }
        Ok(Kind::Execute(Call { result, procedure, arguments }))
    }

    fn begins_argument(&self) -> bool {
        match self.peek() {
            Token::Text(_) | Token::Number(_) | Token::Variable(_) | Token::Quoted(_) => true,
            Token::Symbol(symbol) => *symbol == "-",
            Token::Word(word) => word.eq_ignore_ascii_case("null") || !is_reserved(word),
            Token::End => false,
        }
    }

    /// A procedure takes constants and variables, no expressions.
    fn constant(&mut self) -> Result<Expression, ParseError> {
        match self.peek().clone() {
            Token::Word(word) if word.eq_ignore_ascii_case("null") => {
                self.next();
                Ok(Expression::Literal(Value::Null))
            }
            Token::Word(word) | Token::Quoted(word) => {
                self.next();
                Ok(Expression::Literal(Value::text(&word)))
            }
            Token::Symbol("-") => {
                self.next();
                Ok(Expression::Negate(Box::new(self.primary()?)))
            }
            Token::Text(_) | Token::Number(_) | Token::Variable(_) => self.primary(),
            _ => Err(self.wrong()),
        }
    }

    fn filter(&mut self) -> Result<Option<Expression>, ParseError> {
        if self.word("where") { self.condition().map(Some) } else { Ok(None) }
    }

    fn alias(&mut self) -> Result<Option<String>, ParseError> {
        if self.word("as") {
            return match self.peek().clone() {
                Token::Text(name) => {
                    self.next();
                    Ok(Some(name))
                }
                _ => self.identifier().map(Some),
            };
        }
        match self.peek().clone() {
            Token::Quoted(name) | Token::Text(name) => {
                self.next();
                Ok(Some(name))
            }
            Token::Word(name) if !is_reserved(&name) && !self.begins_statement() => {
                self.next();
                Ok(Some(name))
            }
            _ => Ok(None),
        }
    }

    fn begins_statement(&self) -> bool {
        self.is_word("throw")
    }

    fn select(&mut self) -> Result<Select, ParseError> {
        let top = if self.word("top") {
            let bracket = self.symbol("(");
            let count = if bracket { self.additive()? } else { self.primary()? };
            if bracket {
                self.expect(")")?;
            }
            Some(count)
        } else {
            None
        };
        let items = self.list(Self::item)?;
        let assigns = items.iter().filter(|item| matches!(item, Item::Assign(..))).count();
        if assigns != 0 && assigns != items.len() {
            let message = "A SELECT statement that assigns a value to a variable must not be combined with \
                           data-retrieval operations.";
            return Err(ParseError { number: 141, message: message.to_owned() });
        }
        let from = if self.word("from") {
            let name = self.name()?;
            self.hints()?;
            Some(name)
        } else {
            None
        };
        let filter = self.filter()?;
        let mut order = Vec::new();
        if self.word("order") {
            self.expect_word("by")?;
            order = self.list(|parser| {
                let by = parser.additive()?;
                let descending = parser.word("desc");
                if !descending {
                    parser.word("asc");
                }
                Ok((by, descending))
            })?;
        }
        Ok(Select { items, from, filter, order, top })
    }

    fn hints(&mut self) -> Result<(), ParseError> {
        if self.word("with") {
            self.expect("(")?;
            self.list(Self::any_identifier)?;
            self.expect(")")?;
        }
        Ok(())
    }

    fn item(&mut self) -> Result<Item, ParseError> {
        if self.symbol("*") {
            return Ok(Item::All);
        }
        if let (Token::Variable(name), Token::Symbol("=")) = (self.peek().clone(), self.peek_after(1)) {
            self.next();
            self.next();
            return Ok(Item::Assign(self.variable(&name)?, self.additive()?));
        }
        let value = self.additive()?;
        let own = match &value {
            Expression::Column(name, _) => name.clone(),
            _ => String::new(),
        };
        Ok(Item::Value(value, self.alias()?.unwrap_or(own)))
    }

    fn output(&mut self) -> Result<Vec<(Expression, String)>, ParseError> {
        if !self.word("output") {
            return Ok(Vec::new());
        }
        self.list(|parser| match parser.item()? {
            Item::Value(value, name) => Ok((value, name)),
            _ => Err(parser.wrong()),
        })
    }

    fn update(&mut self) -> Result<Update, ParseError> {
        let table = self.name()?;
        self.hints()?;
        self.expect_word("set")?;
        let changes = self.list(|parser| {
            let mut change = Change { variable: None, column: None, value: Expression::Literal(Value::Null) };
            if let Token::Variable(name) = parser.peek().clone() {
                parser.next();
                change.variable = Some(parser.variable(&name)?);
                parser.expect("=")?;
            }
            let is_column = change.variable.is_none()
                || matches!(parser.peek(), Token::Word(_) | Token::Quoted(_))
                    && *parser.peek_after(1) == Token::Symbol("=");
            if is_column {
                change.column = Some(parser.name()?.table);
                if parser.symbol("+=") {
                    let column = Expression::Column(change.column.clone().unwrap_or_default(), false);
                    let amount = parser.additive()?;
                    change.value = Expression::Arithmetic('+', Box::new(column), Box::new(amount));
                    return Ok(change);
                }
                parser.expect("=")?;
            }
            change.value = parser.additive()?;
            Ok(change)
        })?;
        let output = self.output()?;
        Ok(Update { table, changes, output, filter: self.filter()? })
    }

    fn insert(&mut self) -> Result<Insert, ParseError> {
        self.word("into");
        let table = self.name()?;
        let mut columns = Vec::new();
        if self.symbol("(") {
            columns = self.list(|parser| Ok(parser.identifier()?.to_lowercase()))?;
            self.expect(")")?;
        }
        let output = self.output()?;
        let (mut rows, mut from) = (Vec::new(), None);
        if self.word("select") {
            from = Some(self.select()?);
        } else {
            self.expect_word("values")?;
            rows = self.list(|parser| {
                parser.expect("(")?;
                let row = parser.list(Self::additive)?;
                parser.expect(")")?;
                Ok(row)
            })?;
        }
        Ok(Insert { table, columns, rows, from, output })
    }

    fn columns(&mut self) -> Result<Vec<Column>, ParseError> {
        self.expect("(")?;
        let mut keys = Vec::new();
        let columns = self.list(|parser| {
            if parser.word("constraint") {
                parser.identifier()?;
            }
            if parser.word("primary") {
                parser.expect_word("key")?;
                parser.any_word(&["clustered", "nonclustered"]);
                parser.expect("(")?;
                keys = parser.list(|parser| Ok(parser.identifier()?.to_lowercase()))?;
                parser.expect(")")?;
                return Ok(None);
            }
            let name = parser.identifier()?.to_lowercase();
            let of = parser.data_type()?;
            let mut column = Column { name, of, nullable: true, key: false };
            loop {
                if parser.word("not") {
                    parser.expect_word("null")?;
                    column.nullable = false;
                } else if parser.word("primary") {
                    parser.expect_word("key")?;
                    parser.any_word(&["clustered", "nonclustered"]);
                    column.nullable = false;
                    column.key = true;
                } else if parser.word("constraint") {
                    parser.identifier()?;
                } else if !parser.word("null") {
                    return Ok(Some(column));
                }
            }
        })?;
        self.expect(")")?;
        let mut columns: Vec<Column> = columns.into_iter().flatten().collect();
        for column in &mut columns {
            column.key |= keys.contains(&column.name);
            column.nullable &= !column.key;
        }
        Ok(columns)
    }

    fn condition(&mut self) -> Result<Expression, ParseError> {
        let mut left = self.conjunction()?;
        while self.word("or") {
            left = Expression::Or(Box::new(left), Box::new(self.conjunction()?));
        }
        Ok(left)
    }

    fn conjunction(&mut self) -> Result<Expression, ParseError> {
        let mut left = self.negation()?;
        while self.word("and") {
            left = Expression::And(Box::new(left), Box::new(self.negation()?));
        }
        Ok(left)
    }

    fn negation(&mut self) -> Result<Expression, ParseError> {
        if self.word("not") {
            return Ok(Expression::Not(Box::new(self.negation()?)));
        }
        if self.word("exists") {
            self.expect("(")?;
            self.expect_word("select")?;
            let select = self.select()?;
            self.expect(")")?;
            return Ok(Expression::Exists(Box::new(select)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expression, ParseError> {
        let left = self.additive()?;
        for symbol in ["<=", ">=", "<>", "!=", "!<", "!>", "<", ">", "="] {
            if self.symbol(symbol) {
                return Ok(Expression::Compare(symbol, Box::new(left), Box::new(self.additive()?)));
            }
        }
        if self.word("is") {
            let negated = self.word("not");
            self.expect_word("null")?;
            let is = Expression::IsNull(Box::new(left));
            return Ok(if negated { Expression::Not(Box::new(is)) } else { is });
        }
        let negated = self.is_word("not") && self.is_word_after(1, "in") && self.word("not");
        if self.word("in") {
            self.expect("(")?;
            let list = self.list(Self::additive)?;
            self.expect(")")?;
            let is = Expression::In(Box::new(left), list);
            return Ok(if negated { Expression::Not(Box::new(is)) } else { is });
        }
        // In brackets, it may be a condition already.
        Ok(left)
    }

    fn additive(&mut self) -> Result<Expression, ParseError> {
        let mut left = self.multiplicative()?;
        loop {
            let sign = match self.peek() {
                Token::Symbol("+") => '+',
                Token::Symbol("-") => '-',
                Token::Symbol("&") => '&',
                _ => return Ok(left),
            };
            self.next();
            left = Expression::Arithmetic(sign, Box::new(left), Box::new(self.multiplicative()?));
        }
    }

    fn multiplicative(&mut self) -> Result<Expression, ParseError> {
        let mut left = self.unary()?;
        loop {
            let sign = match self.peek() {
                Token::Symbol("*") => '*',
                Token::Symbol("/") => '/',
                Token::Symbol("%") => '%',
                _ => return Ok(left),
            };
            self.next();
            left = Expression::Arithmetic(sign, Box::new(left), Box::new(self.unary()?));
        }
    }

    fn unary(&mut self) -> Result<Expression, ParseError> {
        if self.symbol("-") {
            return Ok(Expression::Negate(Box::new(self.unary()?)));
        }
        if self.symbol("+") {
            return self.unary();
        }
        self.primary()
    }

    fn primary(&mut self) -> Result<Expression, ParseError> {
        match self.peek().clone() {
            Token::Text(text) => {
                self.next();
                Ok(Expression::Literal(Value::text(&text)))
            }
            Token::Number(digits) => {
                self.next();
                number(&digits)
            }
            Token::Variable(name) if name.starts_with("@@") => {
                self.next();
                Ok(Expression::Global(name))
            }
            Token::Variable(name) => {
                self.next();
                Ok(Expression::Variable(self.variable(&name)?))
            }
            Token::Symbol("(") => {
                self.next();
                let inner = if self.word("select") {
                    Expression::Query(Box::new(self.select()?))
                } else {
                    self.condition()?
                };
                self.expect(")")?;
                Ok(inner)
            }
            Token::Word(word) if word.eq_ignore_ascii_case("null") => {
                self.next();
                Ok(Expression::Literal(Value::Null))
            }
            Token::Word(word) if word.eq_ignore_ascii_case("case") => {
                self.next();
                self.case()
            }
            Token::Word(word) if *self.peek_after(1) == Token::Symbol("(") && !is_reserved(&word) => {
                self.next();
                self.next();
                self.function(word.to_lowercase())
            }
            Token::Word(_) | Token::Quoted(_) => {
                let mut name = self.identifier()?.to_lowercase();
                let mut old = false;
                while self.symbol(".") {
                    old = name == "deleted";
                    name = self.identifier()?.to_lowercase();
                }
                Ok(Expression::Column(name, old))
            }
            _ => Err(self.wrong()),
        }
    }

    fn case(&mut self) -> Result<Expression, ParseError> {
        let mut cases = Vec::new();
        if !self.is_word("when") {
            return Err(self.wrong());
        }
        while self.word("when") {
            let condition = self.condition()?;
            self.expect_word("then")?;
            cases.push((condition, self.additive()?));
        }
        let otherwise = if self.word("else") { Some(Box::new(self.additive()?)) } else { None };
        self.expect_word("end")?;
        Ok(Expression::Case(cases, otherwise))
    }

    fn function(&mut self, name: String) -> Result<Expression, ParseError> {
        if name == "cast" {
            let value = self.additive()?;
            self.expect_word("as")?;
            let of = self.data_type()?;
            self.expect(")")?;
            return Ok(Expression::Cast(Box::new(value), of));
        }
        if name == "convert" {
            let of = self.data_type()?;
            self.expect(",")?;
            let value = self.additive()?;
            if self.symbol(",") {
                self.additive()?;
            }
            self.expect(")")?;
            return Ok(Expression::Cast(Box::new(value), of));
        }
        let mut arguments = Vec::new();
        if matches!(name.as_str(), "datediff" | "datediff_big" | "datepart" | "dateadd") {
            arguments.push(Expression::Literal(Value::text(&self.any_identifier()?.to_lowercase())));
            self.expect(",")?;
        }
        if name == "count" && self.symbol("*") {
            self.expect(")")?;
            return Ok(Expression::Function(name, arguments));
        }
        if !self.is_symbol(")") {
            arguments.extend(self.list(Self::additive)?);
        }
        self.expect(")")?;
        Ok(Expression::Function(name, arguments))
    }
}

fn number(digits: &str) -> Result<Expression, ParseError> {
    if let Some(hexadecimal) = digits.strip_prefix("0x") {
        let value = i64::from_str_radix(hexadecimal, 16).map_err(|_| near(digits))?;
        return Ok(Expression::Literal(Value::BigInt(value)));
    }
    let value: i64 = digits.parse().map_err(|_| near(digits))?;
    Ok(Expression::Literal(i32::try_from(value).map_or(Value::BigInt(value), Value::Int)))
}

/// Batches that were parsed before, by their text and the declarations of their parameters.
#[derive(Debug, Default)]
pub(super) struct Cache {
    parameters: HashMap<String, Arc<[Variable]>>,
    batches: HashMap<String, HashMap<String, Arc<Batch>>>,
}

impl Cache {
    /// More than a test has different ones.
    const MOST: usize = 2000;

    /// Parses declarations, unless they were parsed before.
    pub(super) fn parameters(&mut self, declared: &str) -> Result<Arc<[Variable]>, ParseError> {
        if let Some(found) = self.parameters.get(declared) {
            return Ok(found.clone());
        }
        let parsed: Arc<[Variable]> = parameters(declared)?.into();
        self.parameters.insert(declared.to_owned(), parsed.clone());
        Ok(parsed)
    }

    /// Parses a batch, unless it was parsed before.
    pub(super) fn batch(&mut self, text: &str, declared: &str) -> Result<Arc<Batch>, ParseError> {
        if let Some(found) = self.batches.get(declared).and_then(|batches| batches.get(text)) {
            return Ok(found.clone());
        }
        let parsed = Arc::new(batch(text, &self.parameters(declared)?)?);
        let batches = self.batches.entry(declared.to_owned()).or_default();
        if batches.len() >= Self::MOST {
            batches.clear();
        }
        batches.insert(text.to_owned(), parsed.clone());
        Ok(parsed)
    }
}
