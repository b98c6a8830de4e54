//! Wakes those who wait for a lock file when its holder closes it, which the kernel also does for a killed process.
//!
//! On Linux by inotify: one instance and one thread in the process, asleep unless a watched file is closed. Elsewhere,
//! and when the limit of inotify instances is reached, nobody is woken and waiters poll.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::Notify;

/// A lock file under watch.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) closed: Arc<Notify>,
    #[cfg(target_os = "linux")]
    descriptor: i32,
}

impl Watch {
    /// Watches an existing file. `None`: it can't be watched.
    #[cfg(target_os = "linux")]
    pub(super) fn new(path: &Path) -> Option<Self> {
        linux::Watcher::get()?.watch(path)
    }

    /// Watches an existing file. `None`: it can't be watched.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn new(_path: &Path) -> Option<Self> {
        None
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::HashMap;
    use std::mem::MaybeUninit;
    use std::os::fd::OwnedFd;
    use std::path::Path;
    use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

    use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
    use tokio::sync::Notify;

    use super::Watch;

    pub(super) struct Watcher {
        inotify: OwnedFd,
        /// By watch descriptor, which is the same for every watch of the same file: who to wake, how many watches.
        watched: Mutex<HashMap<i32, (Arc<Notify>, usize)>>,
    }

    impl Watcher {
        pub(super) fn get() -> Option<&'static Self> {
            static WATCHER: OnceLock<Option<Arc<Watcher>>> = OnceLock::new();
            WATCHER.get_or_init(Self::start).as_deref()
        }

        fn start() -> Option<Arc<Self>> {
            let started =
                inotify::init(CreateFlags::CLOEXEC).map_err(std::io::Error::from).and_then(|inotify| {
                    let watcher = Arc::new(Self { inotify, watched: Mutex::default() });
                    let thread = std::thread::Builder::new().name("fencelock-inotify".to_owned());
                    thread.spawn({
                        let watcher = watcher.clone();
                        move || watcher.dispatch()
                    })?;
                    Ok(watcher)
                });
            started.inspect_err(|error| tracing::warn!(%error, "no inotify: waiters on lock files poll")).ok()
        }

        fn lock(&self) -> MutexGuard<'_, HashMap<i32, (Arc<Notify>, usize)>> {
            self.watched.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(super) fn watch(&self, path: &Path) -> Option<Watch> {
            let mut watched = self.lock();
            // Other programs may have opened it for reading only: `flock` from util-linux does.
            let closed = WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE;
            let events = closed | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
            let descriptor = inotify::add_watch(&self.inotify, path, events)
                .inspect_err(|error| tracing::debug!(%error, "a lock file can't be watched: polling"))
                .ok()?;
            let (closed, count) = watched.entry(descriptor).or_default();
            *count += 1;
            Some(Watch { closed: closed.clone(), descriptor })
        }

        fn unwatch(&self, descriptor: i32) {
            let mut watched = self.lock();
            if let Some((_, count)) = watched.get_mut(&descriptor) {
                *count -= 1;
                if *count == 0 {
                    watched.remove(&descriptor);
                    // Fails if the kernel has dropped it with the file.
                    let _ = inotify::remove_watch(&self.inotify, descriptor);
                }
            }
        }

        /// The thread: wakes until the process ends.
        fn dispatch(&self) {
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
            loop {
                match reader.next() {
                    Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => {
                        self.lock().values().for_each(|(closed, _)| closed.notify_waiters());
                    }
                    Ok(event) => {
                        if let Some((closed, _)) = self.lock().get(&event.wd()) {
                            closed.notify_waiters();
                        }
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        tracing::error!(%error, "inotify failed: waiters on lock files poll");
                        return;
                    }
                }
            }
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            if let Some(watcher) = Watcher::get() {
                watcher.unwatch(self.descriptor);
            }
        }
    }
}
