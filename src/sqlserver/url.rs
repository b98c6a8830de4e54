//! What a URL or a connection string says about a SQL Server. No I/O.

use std::net::IpAddr;

use percent_encoding::percent_decode_str;
use tiberius::{AuthMethod, Config, EncryptionLevel};

use super::SqlServerLocks;
use crate::error::{Error, ErrorKind, Result};

/// Parameters about the connection that a URL may have. Several spellings mean the same, one in each row: ours, and what drivers
/// of other languages call it.
const PARAMETERS: [&[&str]; 8] = [
    &["encrypt", "Encrypt"],
    &["trust_server_certificate", "trustServerCertificate", "TrustServerCertificate"],
    &["trust_server_certificate_ca", "trustServerCertificateCA"],
    &["host_name_in_certificate", "hostNameInCertificate"],
    &["application_name", "applicationName", "ApplicationName"],
    &["instance", "instanceName"],
    &["database", "databaseName", "Database"],
    &["multi_subnet_failover", "multiSubnetFailover"],
];

/// The same in one list.
pub(crate) fn parameters() -> impl Iterator<Item = &'static str> {
    PARAMETERS.into_iter().flatten().copied()
}

fn config_error(message: &'static str) -> Error {
    Error::new(ErrorKind::Config, message)
}

/// What a URL says about the connection, by our names.
struct Parameters<'a>(&'a [(&'a str, &'a str)]);

impl<'a> Parameters<'a> {
    fn get(&self, name: &str) -> Result<Option<&'a str>> {
        let spellings =
            PARAMETERS.into_iter().find(|spellings| spellings[0] == name).expect("it is in the list");
        let mut values = self.0.iter().filter(|(key, _)| spellings.contains(key)).map(|(_, value)| *value);
        let value = values.next();
        if values.next().is_some() {
            return Err(config_error("a parameter stands twice in the URL, in two spellings"));
        }
        Ok(value)
    }

    fn is_set(&self, name: &'static str) -> Result<bool> {
        match self.get(name)?.map(str::to_ascii_lowercase).as_deref() {
            None | Some("false" | "no") => Ok(false),
            Some("true" | "yes") => Ok(true),
            Some(_) => Err(Error::new(ErrorKind::Config, format!("{name} in the URL must be true or false"))),
        }
    }
}

/// Locks on the server that a URL names: what stands between its scheme and its query, and what that says about the connection.
pub(crate) fn locks(rest: &str, parameters: &[(&str, &str)]) -> Result<SqlServerLocks> {
    let parameters = Parameters(parameters);
    let unreadable = || {
        config_error(
            "the sqlserver URL can't be read: `sqlserver://USER:PASSWORD@HOST:PORT/DATABASE`, with / ? @ : # % in user and \
             password percent-encoded",
        )
    };
    let rest = rest.strip_prefix("//").ok_or_else(unreadable)?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (login, address) = match authority.rsplit_once('@') {
        Some((login, address)) => (Some(login), address),
        None => (None, authority),
    };
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            (host, Some(port.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(unreadable)?))
        }
        _ => (address, None),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.is_empty() || host.contains([',', '\\', '@', ' ']) || (bare.contains(':') && bare == host) {
        return Err(unreadable());
    }
    let decoded =
        |text: &str| percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| unreadable());

    let mut config = Config::new();
    config.host(host);
    if let Some(port) = port {
        config.port(port);
    }
    config.authentication(match login {
        Some(login) => {
            let (user, password) = login.split_once(':').unwrap_or((login, ""));
            AuthMethod::sql_server(decoded(user)?, decoded(password)?)
        }
        None => whoever_runs_this()?,
    });
    match (path, parameters.get("database")?) {
        ("", None) => {}
        ("", Some(database)) => config.database(database),
        (path, None) if !path.contains('/') => config.database(decoded(path)?),
        _ => return Err(unreadable()),
    }
    config.application_name(parameters.get("application_name")?.unwrap_or("fencelock"));
    if let Some(instance) = parameters.get("instance")? {
        config.instance_name(instance);
    }
    match parameters.get("host_name_in_certificate")? {
        Some(name) => config.hostname_in_certificate(name),
        None if bare != host => config.hostname_in_certificate(bare), // certificates have no brackets
        None => {}
    }
    config.multi_subnet_failover(parameters.is_set("multi_subnet_failover")?);

    let trusts_any = parameters.is_set("trust_server_certificate")?;
    let authority = parameters.get("trust_server_certificate_ca")?;
    match (trusts_any, authority) {
        (true, Some(_)) => {
            return Err(config_error(
                "trust_server_certificate trusts any: trust_server_certificate_ca would say nothing",
            ));
        }
        (true, None) => config.trust_cert(),
        (false, Some(file)) => config.trust_cert_ca(file),
        (false, None) => {}
    }
    let encryption = match parameters.get("encrypt")?.map(str::to_ascii_lowercase).as_deref() {
        None => None,
        Some("on" | "true" | "yes" | "mandatory" | "require" | "required") => Some(EncryptionLevel::Required),
        Some("strict") => Some(EncryptionLevel::Strict),
        Some("login") => Some(EncryptionLevel::Off),
        Some("off" | "false" | "no" | "disable" | "disabled") => Some(EncryptionLevel::NotSupported),
        Some(_) => return Err(config_error("encrypt in the URL is on, strict, login or off")),
    };
    secured(config, encryption, trusts_any || authority.is_some())
}

/// Locks on the server of an ADO.NET connection string.
pub(super) fn ado(string: &str) -> Result<SqlServerLocks> {
    // The driver's error may contain a part of the string.
    // It would go to this machine.
    let is_server = |pair: &String| pair.starts_with("server=") || pair.starts_with("datasource=");
    if !pairs(string).iter().any(is_server) {
        return Err(config_error("the connection string names no server: `Server=tcp:HOST,PORT`"));
    }
    let config = Config::from_ado_string(string).map_err(|_| {
        config_error(
            "the connection string can't be read: `Server=tcp:HOST,PORT;Database=NAME;User ID=NAME;Password='PASSWORD'`, with \
             ; = ' in values in quotes",
        )
    });
    of_string(string, config)
}

/// Locks on the server of a JDBC connection string.
pub(super) fn jdbc(string: &str) -> Result<SqlServerLocks> {
    // It would go to this machine; another place for the name is passed over.
    if string.split_once("//").is_none_or(|(_, rest)| rest.is_empty() || rest.starts_with(';')) {
        return Err(config_error("the connection string names no server: `jdbc:sqlserver://HOST:PORT`"));
    }
    if has_blank_keys(string) {
        // The driver would pass over them, a password or `encrypt` among them.
        return Err(config_error("in a JDBC connection string no blank may stand before or behind a key"));
    }
    let config = Config::from_jdbc_string(string).map_err(|_| {
        config_error(
            "the connection string can't be read: `jdbc:sqlserver://HOST:PORT;database=NAME;user=NAME;password={PASSWORD}`, \
             with ; = { in values in braces",
        )
    });
    of_string(string, config)
}

fn of_string(string: &str, config: Result<Config>) -> Result<SqlServerLocks> {
    let pairs = pairs(string);
    // The driver passes over other names of it, and would go to this machine.
    let is_address =
        |pair: &String| ["addr=", "address=", "networkaddress="].iter().any(|key| pair.starts_with(key));
    if pairs.iter().any(is_address) {
        return Err(config_error("the server of a connection string is called `Server` or `Data Source`"));
    }
    let says = |key: &str| pairs.iter().any(|pair| pair.starts_with(key));
    if says("encrypt=") {
        // It has been read by the driver, which refuses what this build can't do.
        return match config {
            Err(_) if !driver_has_tls() && !says("encrypt=f") && !says("encrypt=n") => Err(without_tls()),
            config => Ok(SqlServerLocks::new(config?)),
        };
    }
    // Wherever it stands, since the driver may take another part of it for a key than we do, and then trusts nobody else.
    let text: String = string.to_lowercase().split_whitespace().collect();
    secured(config?, None, text.contains("trustservercertificate"))
}

/// Whether a key of a JDBC connection string begins or ends with a blank. A semicolon in braces is none.
fn has_blank_keys(string: &str) -> bool {
    let (mut in_braces, mut in_key, mut before) = (false, false, ' ');
    for character in string.chars() {
        match character {
            '{' => in_braces = true,
            '}' => in_braces = false,
            _ if in_braces => {}
            ';' => in_key = true,
            '=' if in_key && before.is_whitespace() => return true,
            '=' => in_key = false,
            _ if in_key && before == ';' && character.is_whitespace() => return true,
            _ => {}
        }
        before = character;
    }
    false
}

/// The pairs of a connection string, in lower case and without blanks. A semicolon in quotes or braces is none.
fn pairs(string: &str) -> Vec<String> {
    let (mut pairs, mut quoted) = (vec![String::new()], None);
    for character in string.chars() {
        match (quoted, character) {
            (None, ';') => {
                pairs.push(String::new());
                continue;
            }
            (None, '\'' | '"') => quoted = Some(character),
            (None, '{') => quoted = Some('}'),
            (Some(end), _) if end == character => quoted = None,
            _ => {}
        }
        if let Some(pair) = pairs.last_mut()
            && !character.is_whitespace()
        {
            pair.extend(character.to_lowercase());
        }
    }
    pairs
}

/// With the encryption that is asked for, or else with the one that is right: all connections are encrypted, but those that stay
/// on this machine only if the server can do it.
fn secured(
    mut config: Config,
    encryption: Option<EncryptionLevel>,
    says_whom_to_trust: bool,
) -> Result<SqlServerLocks> {
    let has_tls = driver_has_tls();
    let plain = |mut config: Config| {
        config.encryption(EncryptionLevel::NotSupported);
        config
    };
    match encryption {
        Some(EncryptionLevel::NotSupported) => Ok(SqlServerLocks::new(plain(config))),
        Some(_) if !has_tls => Err(without_tls()),
        Some(level) => {
            config.encryption(level);
            Ok(SqlServerLocks::new(config))
        }
        None if is_local(&config) && has_tls => {
            let fallback = plain(config.clone());
            config.encryption(EncryptionLevel::Required);
            if !says_whom_to_trust {
                config.trust_cert(); // there is no way to it on which somebody could stand
            }
            Ok(SqlServerLocks::new(config).here(Some(fallback)))
        }
        None if is_local(&config) => Ok(SqlServerLocks::new(plain(config)).here(None)),
        None if !has_tls => Err(without_tls()),
        None => {
            config.encryption(EncryptionLevel::Required);
            Ok(SqlServerLocks::new(config))
        }
    }
}

fn without_tls() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "connections to SQL Server are encrypted, and this build has no TLS: turn on the cargo feature `rustls`, or the feature \
         `native-tls` of the crate `tiberius`, or say `encrypt=off` on a network that can be trusted",
    )
}

/// Whether the driver was built with TLS, by this crate's features or by the application's: what it does by itself tells.
fn driver_has_tls() -> bool {
    format!("{:?}", Config::new()).contains("encryption: Required")
}

/// Whether connections stay on this machine.
fn is_local(config: &Config) -> bool {
    let address = config.get_addr();
    let host = address.rsplit_once(':').map_or(&*address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The Windows user who runs this.
#[cfg(windows)]
#[expect(clippy::unnecessary_wraps, reason = "elsewhere there is none")]
fn whoever_runs_this() -> Result<AuthMethod> {
    Ok(AuthMethod::Integrated)
}

#[cfg(not(windows))]
fn whoever_runs_this() -> Result<AuthMethod> {
    Err(config_error("the sqlserver URL names no user, as in `sqlserver://user:password@host/database`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_whether_it_has_tls() {
        assert_eq!(driver_has_tls(), cfg!(feature = "rustls"));
    }

    #[test]
    fn pairs_are_told_from_what_is_quoted() {
        let read = |string| pairs(string).join("|");
        assert_eq!(read("Server=a; Encrypt = true"), "server=a|encrypt=true");
        assert_eq!(read("Password='x;encrypt=no';A=b"), "password='x;encrypt=no'|a=b");
        assert_eq!(read("password={x;encrypt=no};a=b"), "password={x;encrypt=no}|a=b");
    }

    #[test]
    fn a_string_that_the_driver_reads_otherwise_makes_nobody_panic() {
        let string = "Server=tcp:127.0.0.1,1433;x\"y=true;TrustServerCertificateCA=/nowhere.pem";
        assert!(!pairs(string).iter().any(|pair| pair.starts_with("trust")), "{:?}", pairs(string));
        assert!(ado(string).is_ok());
    }

    #[test]
    fn knows_what_stays_on_this_machine() {
        let is_local = |url: &str| {
            let mut config = Config::new();
            config.host(url);
            is_local(&config)
        };
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.1.2.3", "[::1]"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["db", "localhost.example.com", "10.0.0.1", "[2001:db8::1]", "127.0.0.1.example.com"] {
            assert!(!is_local(host), "{host}");
        }
    }
}
