#!/usr/bin/env bash
# The test command: installs what the suite needs, and runs all of it.
#
#   ./tests/run.sh
#
# On Debian it installs what is missing, as root or through sudo; elsewhere it says what is missing. Nothing is left
# out because it isn't there: that is a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/need.sh

need_rust
need flock util-linux # stands for another program in the tests of `file`
need setpriv util-linux # lets no server outlive its test
need redis-server redis-server
need faketime faketime # moves a server's wall clock
need openssl openssl # makes certificates

# Library, binaries, tests, examples (built), and the documentation's code.
cargo test --locked --all-features --no-fail-fast

# The main job as a user runs it, many times over: who wins is a race.
daily_email() { # daily_email TIMES [FENCELOCK_URL=URL]
    local times=$1 what="daily_email${2:+ with $2}" i last
    for ((i = 1; i <= times; i++)); do
        last=$(env -u FENCELOCK_URL "${@:2}" cargo run --quiet --locked --example daily_email | tail -n 1) ||
            fail "$what: run $i of $times failed"
        [[ $last == *"1 sent, 2 skipped"* ]] || fail "$what: run $i of $times ended with: $last"
    done
    echo "$what, $times times: $last"
}
daily_email 20

# Each process has a `memory:` of its own, so there all three send: the example must notice.
if said=$(FENCELOCK_URL=memory: cargo run --quiet --locked --example daily_email 2>&1) ||
    [[ $said != *"got 3 mails"* ]]; then
    fail "daily_email didn't notice that everybody got three mails, and said: $said"
fi

cargo run --quiet --locked --example paused_holder
cargo run --quiet --locked --example custom_backend --features testing
