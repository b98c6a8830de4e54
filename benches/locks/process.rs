//! The processes that do the work: this program again, told what to do line by line.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::locker::Result;

/// The first argument of such a process.
pub(crate) const CHILD: &str = "child";

pub(crate) struct Process {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// One that takes locks of this backend in this way.
    pub(crate) fn start(backend: &str, way: &str, url: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([CHILD, backend, way, url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("its output is piped")?).lines();
        let mut process = Self { child, lines };
        process.hear()?; // it is connected
        Ok(process)
    }

    pub(crate) fn tell(&mut self, what: &str) -> Result<()> {
        writeln!(self.child.stdin.as_mut().ok_or("its input is piped")?, "{what}")?;
        Ok(())
    }

    pub(crate) fn hear(&mut self) -> Result<Vec<u64>> {
        let line = self.lines.next().ok_or("the other process has ended")??;
        line.split_whitespace().map(|number| Ok(number.parse()?)).collect()
    }

    pub(crate) fn ask(&mut self, what: &str) -> Result<Vec<u64>> {
        self.tell(what)?;
        self.hear()
    }

    /// [`ask`](Self::ask) for one number.
    pub(crate) fn ask_one(&mut self, what: &str) -> Result<u64> {
        Ok(self.ask(what)?.first().copied().ok_or("it has said nothing")?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}
