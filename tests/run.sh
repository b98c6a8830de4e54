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
need faketime faketime # moves a Redis server's wall clock
need '/usr/lib/postgresql/*/bin/initdb' postgresql # with psql
need /usr/sbin/pgbouncer pgbouncer
need_azurite # an emulator of Azure Blob Storage
need openssl openssl # makes certificates
need pkg-config pkg-config # finds OpenSSL for the feature `native-tls`
need /usr/include/openssl/ssl.h libssl-dev # which is built with it

# Library, binaries, tests, examples (built), and the documentation's code.
cargo test --locked --all-features --no-fail-fast

# With all features on, TLS is rustls; and these are other builds of the driver.
cargo test --locked --features redis,native-tls --lib --test redis_connect
cargo test --locked --features redis,rustls --test redis_connect tls::
cargo test --locked --features redis --lib --test redis_connect -- connect:: urls::
cargo test --locked --features postgres,native-tls --test postgres_connect tls::
cargo test --locked --features postgres --lib --test postgres_connect -- connect:: tls:: urls::
cargo test --locked --features sqlserver --lib --test sqlserver_connect -- connect:: sqlserver:: tls:: urls::
cargo test --locked --features azure --lib --test azure_connect -- azure:: connect:: urls::
cargo test --locked --lib connect::

# The main job as a user runs it, many times over: who wins is a race.
daily_email() { # daily_email TIMES [FENCELOCK_URL=URL]
    local times=$1 what="daily_email${2:+ with $2}" i last
    for ((i = 1; i <= times; i++)); do
        last=$(env -u FENCELOCK_URL "${@:2}" cargo run --quiet --locked --features postgres,redis --example daily_email | tail -n 1) ||
            fail "$what: run $i of $times failed"
        [[ $last == *"1 sent, 2 skipped"* ]] || fail "$what: run $i of $times ended with: $last"
    done
    echo "$what, $times times: $last"
}
daily_email 20

# A server of our own, at $server.
servers=()
scratch=$(mktemp -d)
trap 'kill -INT "${servers[@]}" 2>/dev/null; wait; rm -rf "$scratch"' EXIT
start_redis() {
    local port pid
    for _ in {1..20}; do
        port=$((10000 + RANDOM % 20000))
        redis-server --bind 127.0.0.1 --port "$port" --save '' --dir "$scratch" >"$scratch/$port.log" 2>&1 &
        pid=$!
        servers+=("$pid")
        server=127.0.0.1:$port
        while kill -0 "$pid" 2>/dev/null; do
            # On a port that was taken somebody else may answer.
            if redis-cli -p "$port" INFO server 2>/dev/null | grep -q "^process_id:$pid\b"; then
                return
            fi
            sleep 0.05
        done
    done
    fail "redis-server doesn't start: $(cat "$scratch/$port.log")"
}
start_postgres() {
    local bin port pid data=$scratch/postgres as=()
    bin=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
    mkdir "$data"
    if ((EUID == 0)); then
        # It refuses to run as root.
        chmod o+x "$scratch"
        chown postgres "$data"
        as=(setpriv --reuid postgres --regid postgres --clear-groups)
    fi
    "${as[@]}" "$bin/initdb" --no-sync --auth trust --username postgres -D "$data" >"$scratch/initdb.log" 2>&1 ||
        fail "initdb: $(cat "$scratch/initdb.log")"
    for _ in {1..20}; do
        port=$((10000 + RANDOM % 20000))
        "${as[@]}" "$bin/postgres" -D "$data" -p "$port" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
            -c fsync=off >"$scratch/postgres.log" 2>&1 &
        pid=$!
        server=postgres@127.0.0.1:$port/postgres
        while kill -0 "$pid" 2>/dev/null; do
            # On a port that was taken somebody else may answer.
            if [[ $(psql -At "postgres://$server" -c 'SHOW data_directory' 2>/dev/null) == "$data" ]]; then
                servers+=("$pid")
                return
            fi
            sleep 0.05
        done
    done
    fail "postgres doesn't start: $(cat "$scratch/postgres.log")"
}
nodes=()
for _ in {1..3}; do
    start_redis
    nodes+=("$server")
done
daily_email 10 "FENCELOCK_URL=redis://${nodes[0]}"
start_postgres
daily_email 10 "FENCELOCK_URL=postgres://$server"
daily_email 10 "FENCELOCK_URL=redlock://$(IFS=,; echo "${nodes[*]}")"

# Each process has a `memory:` of its own, so there all three send: the example must notice.
if said=$(FENCELOCK_URL=memory: cargo run --quiet --locked --features postgres,redis --example daily_email 2>&1) ||
    [[ $said != *"got 3 mails"* ]]; then
    fail "daily_email didn't notice that everybody got three mails, and said: $said"
fi

cargo run --quiet --locked --example paused_holder
cargo run --quiet --locked --features testing --example custom_backend
