//! One round of votes for a claim, and the token that comes of it: what is decided, without any I/O. The model in
//! `tests/redlock_model` drives this very code.

/// What the votes come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A majority has granted it.
    Won,
    /// Another owner has a majority.
    Busy,
    /// Nobody is known to have a majority: the votes are split.
    Split,
    /// Too few nodes answer for anybody to get a majority.
    Unreachable,
}

/// What is to be done for the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Agreement {
    /// A majority has counted up to this number: it is the token.
    Token(u64),
    /// These nodes have to raise their counters to this number first.
    Raise { token: u64, nodes: Vec<usize> },
}

/// The votes of so many nodes for one owner.
#[derive(Clone, Debug)]
pub(crate) struct Ballot<H> {
    nodes: usize,
    granted: Vec<(usize, u64)>,
    busy: Vec<(usize, H)>,
    failed: usize,
}

/// A majority of so many nodes.
pub(crate) const fn quorum(nodes: usize) -> usize {
    nodes / 2 + 1
}

impl<H: PartialEq> Ballot<H> {
    pub(crate) fn new(nodes: usize) -> Self {
        Self { nodes, granted: Vec::new(), busy: Vec::new(), failed: 0 }
    }

    /// A node has granted it, and counted up to `counter`.
    pub(crate) fn grants(&mut self, node: usize, counter: u64) {
        self.granted.push((node, counter));
    }

    /// A node has it held by another owner.
    pub(crate) fn refuses(&mut self, node: usize, holder: H) {
        self.busy.push((node, holder));
    }

    /// A node has no vote, or hasn't answered.
    pub(crate) fn fails(&mut self) {
        self.failed += 1;
    }

    /// How many have granted it.
    pub(crate) fn granted(&self) -> usize {
        self.granted.len()
    }

    /// What can be said by now; `None`: it depends on those that haven't answered yet.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        let quorum = quorum(self.nodes);
        let open = self.nodes - self.granted.len() - self.busy.len() - self.failed;
        if self.granted.len() >= quorum {
            return Some(Verdict::Won);
        }
        if self.granted.len() + open >= quorum {
            return None;
        }
        let of = |holder: &H| self.busy.iter().filter(|(_, other)| other == holder).count();
        let most = self.busy.iter().map(|(_, holder)| of(holder)).max().unwrap_or(0);
        if most >= quorum {
            Some(Verdict::Busy)
        } else if open > 0 {
            None
        } else if self.granted.len() + self.busy.len() < quorum {
            Some(Verdict::Unreachable)
        } else {
            // Or a holder's majority has nodes in it that don't answer; asking again doesn't harm.
            Some(Verdict::Split)
        }
    }

    /// The token is the highest number that any node has counted up to. It is the owner's alone once a majority, each
    /// node while the owner holds the lock there, has counted up to it: the next owner's majority shares a node with
    /// that one, which counts on from there.
    pub(crate) fn agreement(&self) -> Agreement {
        let token = self.granted.iter().map(|&(_, counter)| counter).max().unwrap_or(0);
        let behind: Vec<_> =
            self.granted.iter().filter(|&&(_, counter)| counter < token).map(|&(node, _)| node).collect();
        if self.granted.len() - behind.len() >= quorum(self.nodes) {
            Agreement::Token(token)
        } else {
            Agreement::Raise { token, nodes: behind }
        }
    }

    /// A node that had granted it has raised its counter.
    pub(crate) fn raises(&mut self, node: usize, token: u64) {
        for (granted, counter) in &mut self.granted {
            if *granted == node {
                *counter = token.max(*counter);
            }
        }
    }
}
