//! The daily mail, sent once although three instances of the service fire at the same moment.
//!
//! `cargo run --example daily_email` starts three processes. One sends, two skip, and the parent checks that every
//! recipient got exactly one mail. The lock is a file in a temporary directory; with `FENCELOCK_URL` set, it is on
//! that backend. What a service needs of it are `instance` and `send_daily_mail`; the rest stages and checks.

#![warn(let_underscore_drop)]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, fs};

use fencelock::{FencingToken, LockOptions, LockProvider};
use tokio::process::Command;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const RECIPIENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/recipients.csv");

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match arguments.as_slice() {
        [] => three_instances().await,
        [number, start, lock, outbox] => instance(number, start, lock, Path::new(outbox)).await,
        _ => Err("this example takes no arguments".into()),
    };
    if let Err(error) = result {
        eprintln!("daily_email: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// One instance of the service: connects, waits for the hour, does the job if it is the first, and says what it did.
async fn instance(number: &str, start: &str, lock: &str, outbox: &Path) -> Result<()> {
    let provider = fencelock::connect(&env::var("FENCELOCK_URL")?).await?;
    let outbox = Outbox { folder: outbox.to_owned(), instance: number.to_owned() };

    let start = UNIX_EPOCH + Duration::from_millis(start.parse()?);
    tokio::time::sleep(start.duration_since(SystemTime::now()).unwrap_or_default()).await;
    if number == "3" {
        tokio::time::sleep(Duration::from_millis(100)).await; // the clock of this one is slow
    }

    let done = send_daily_mail(&*provider, lock, &outbox).await;
    provider.close().await?; // before `main` ends, also when the job has failed
    println!("{}", done?);
    Ok(())
}

async fn send_daily_mail(provider: &dyn LockProvider, lock: &str, outbox: &Outbox) -> Result<String> {
    let recipients = read_recipients()?;

    // The mails are out before the slow instance comes. It must not find the lock free, so the lock stays held for
    // longer than clocks differ: five seconds here, in production rather some minutes.
    let options = LockOptions::new().hold_at_least(Duration::from_secs(5));

    let Some(guard) = provider.create_lock_with(lock, options).try_acquire().await? else {
        return Ok("skipped".to_owned()); // held by another instance: not an error, and nothing to wait for
    };
    let token = guard.fencing_token();
    guard.run(outbox.send_all(&recipients, token)).await??; // stops between two mails if the lock is lost
    guard.release().await?;
    Ok(format!("sent {} mails with fencing token {token}", recipients.len()))
}

/// The addresses in the second column of the list.
fn read_recipients() -> Result<Vec<String>> {
    let list = fs::read_to_string(RECIPIENTS).map_err(|error| format!("{RECIPIENTS}: {error}"))?;
    let addresses = list.lines().skip(1).map(|line| match line.split_once(',') {
        Some((_name, address)) => Ok(address.to_owned()),
        None => Err(format!("{RECIPIENTS}: no address in {line:?}").into()),
    });
    addresses.collect()
}

/// Stands for the mail server: each mail becomes a file.
struct Outbox {
    folder: PathBuf,
    instance: String,
}

impl Outbox {
    async fn send_all(&self, recipients: &[String], token: FencingToken) -> Result<()> {
        for (number, recipient) in recipients.iter().enumerate() {
            tokio::time::sleep(Duration::from_millis(1)).await; // a mail server takes its time
            // Named after the instance, so that two that send don't overwrite each other's mails.
            let file = self.folder.join(format!("instance-{}-mail-{number}.txt", self.instance));
            fs::write(file, format!("To: {recipient}\nFencing-Token: {token}\n\nGood morning!\n"))?;
        }
        Ok(())
    }
}

/// Starts three instances of this program, shows what each did, and checks the outbox.
async fn three_instances() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let outbox = folder.path().join("outbox");
    fs::create_dir(&outbox)?;
    let url = env::var("FENCELOCK_URL")
        .unwrap_or_else(|_| format!("file:{}", folder.path().join("locks").display()));

    // All fire half a second from now. A service's lock would be named after the job and the day alone; this one also
    // after the run, so that the example can be run again at once.
    let start = (SystemTime::now() + Duration::from_millis(500)).duration_since(UNIX_EPOCH)?;
    let day = start.as_secs() / 86_400; // since 1970; a date library would say 2026-11-24
    let lock = format!("daily-email/day-{day}/run-{}-{}", start.as_millis(), std::process::id());

    let mut instances = Vec::new();
    for number in ["1", "2", "3"] {
        let mut command = Command::new(env::current_exe()?);
        command.arg(number).arg(start.as_millis().to_string()).arg(&lock).arg(&outbox);
        command.env("FENCELOCK_URL", &url).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        instances.push((number, command.spawn()?));
    }

    let (mut sent, mut skipped) = (0, 0);
    for (number, child) in instances {
        let output = child.wait_with_output().await?;
        let said = String::from_utf8(output.stdout)?;
        if !output.status.success() {
            return Err(format!("instance {number} failed: {}", output.status).into());
        }
        print!("instance {number}: {said}");
        match said.split_whitespace().next() {
            Some("sent") => sent += 1,
            Some("skipped") => skipped += 1,
            _ => return Err(format!("instance {number} did not say what it did").into()),
        }
    }

    let mails = mails_by_recipient(&outbox)?;
    let recipients = read_recipients()?;
    for recipient in &recipients {
        match mails.get(recipient) {
            Some(1) => {}
            other => return Err(format!("{recipient} got {} mails", other.unwrap_or(&0)).into()),
        }
    }
    if mails.len() != recipients.len() || (sent, skipped) != (1, 2) {
        return Err(format!("{sent} sent and {skipped} skipped, to {} recipients", mails.len()).into());
    }
    println!("{sent} sent, {skipped} skipped: each of {} recipients has exactly one mail", recipients.len());
    Ok(())
}

fn mails_by_recipient(outbox: &Path) -> Result<BTreeMap<String, usize>> {
    let mut mails = BTreeMap::new();
    for file in fs::read_dir(outbox)? {
        let mail = fs::read_to_string(file?.path())?;
        let recipient = mail.lines().find_map(|line| line.strip_prefix("To: "));
        *mails.entry(recipient.ok_or("a mail without a recipient")?.to_owned()).or_default() += 1;
    }
    Ok(mails)
}
