//! What fencing tokens are for: a holder that is paused for longer than its lease wakes up, doesn't know that another
//! has taken over, and writes. The resource refuses it.
//!
//! `cargo run --example paused_holder`

#![warn(let_underscore_drop)]

use std::error::Error;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use fencelock::{FencingGate, LockOptions, LockProvider, Loss};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let provider: Arc<dyn LockProvider> = fencelock::connect("memory:").await?.into();

    // The protected resource: an account's bookings, behind a gate that knows the largest token it has seen.
    let account = Arc::new(FencingGate::new(Vec::new()));

    // Without renewal the lease is over 200 ms after the grant, whatever the holder is doing.
    let options = LockOptions::new().ttl(Duration::from_millis(200)).auto_renew(false);
    let first = provider.create_lock_with("account-7", options).acquire().await?;
    println!("first holder:  has the lock, fencing token {}", first.fencing_token());

    let (has_written, pause) = mpsc::channel();
    let second = tokio::spawn({
        let (provider, account) = (provider.clone(), account.clone());
        async move {
            let guard = provider.create_lock("account-7").acquire().await?; // waits until the lease is over
            println!("second holder: has the lock, fencing token {}", guard.fencing_token());
            account.enter(guard.fencing_token(), |bookings| bookings.push("booked by the second holder"))?;
            println!("second holder: has written");
            has_written.send(())?;
            guard.release().await?;
            Ok::<_, Box<dyn Error + Send + Sync>>(())
        }
    });

    // Garbage collection, a virtual machine that is moved, a laptop that sleeps: this thread stands still, here until
    // the second holder has written.
    println!("first holder:  is paused");
    pause.recv_timeout(Duration::from_secs(10))?;

    // It goes on where it was, between its last look at the lock and its write. Only the resource can refuse it.
    let late = account.enter(first.fencing_token(), |bookings| bookings.push("booked by the first holder"));
    match &late {
        Ok(()) => println!("first holder:  has written, too: the second holder's booking may be wrong now"),
        Err(stale) => println!("first holder:  wakes up and writes, and is refused: {stale}"),
    }

    // A holder that looks is told. `is_lost` compares the clock, so it is right at once after a pause …
    println!("first holder:  is_lost() says {}", first.is_lost());
    // … and a job that runs under the guard doesn't take one more step.
    let job = first.run(async { println!("first holder:  takes one more step") }).await;
    if let Err(error) = &job {
        println!("first holder:  its job was stopped: {error}");
    }
    // A release reports the loss as well: the job may have run beside another.
    let release = first.release().await;

    second.await?.map_err(|error| error.to_string())?;
    provider.close().await?;

    let told = job.is_err_and(|error| error.loss() == Some(Loss::Expired))
        && release.is_err_and(|error| error.loss() == Some(Loss::Expired));
    if late.is_ok() || !told {
        return Err("the stale holder was not stopped".into());
    }
    let bookings = Arc::into_inner(account).ok_or("somebody else still has the account")?.into_inner();
    println!("the account:   {bookings:?}");
    Ok(())
}
