# Sourced by the scripts: installs what they need, or says what is missing.
# shellcheck shell=bash

fail() {
    echo "error: $*" >&2
    exit 1
}

# need PROGRAM PACKAGE: installs Debian's PACKAGE unless PROGRAM, or a file that matches that pattern, is there.
need() {
    local program=$1 package=$2
    if is_there "$program"; then
        return
    fi
    command -v apt-get >/dev/null || fail "$program is missing: install it (Debian's package is $package)"
    if [[ -z ${APT_UPDATED:-} ]]; then
        as_root apt-get update -q
        APT_UPDATED=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$package" ||
        fail "$program is missing, and Debian's package $package can't be installed"
    is_there "$program" || fail "$program is missing, although $package is installed"
}

is_there() {
    compgen -G "$1" >/dev/null || command -v "$1" >/dev/null
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "this needs root, or sudo: $*"
    fi
}

# Rust in the version that Cargo.toml asks for, or newer: what is there, or by Debian's rustup (since Debian 13).
need_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin # where rustup puts it, if the profile hasn't been read
    need cc gcc # links what Rust compiles
    if [[ -e /etc/debian_version ]]; then
        need /usr/include/stdlib.h libc6-dev # what gcc links with, and only recommends
        need /etc/ssl/certs/ca-certificates.crt ca-certificates # for downloads
    fi
    if ! cargo --version >/dev/null 2>&1; then
        (need rustup rustup && rustup default stable) ||
            fail "Rust is missing: install $wanted or newer, see https://rustup.rs"
    fi
    have=$(rustc --version | cut -d ' ' -f 2)
    [[ $(printf '%s\n' "$wanted" "${have%%-*}" | sort -V | head -n 1) == "$wanted" ]] ||
        fail "Rust $have is too old: install $wanted or newer, see https://rustup.rs"
}

# Azurite as tests/azurite/package-lock.json has it, in a directory that is named after that file's hash. Tests find
# it there, whichever directory Cargo builds in.
need_azurite() {
    local lock=tests/azurite/package-lock.json wanted new
    need node nodejs # 18 or newer
    need npm npm
    wanted=target/azurite/$(sha256sum "$lock" | cut -c 1-16)
    if [[ -d $wanted ]]; then
        return
    fi
    mkdir -p target/azurite
    new=$(mktemp -d target/azurite/new.XXXXXXXX)
    cp tests/azurite/package.json "$lock" "$new"
    (cd "$new" && npm ci --ignore-scripts --no-audit --no-fund) || {
        rm -rf "$new"
        fail "Azurite can't be installed: npm ci has failed"
    }
    # It comes there whole, or not at all; another run may have been faster.
    mv -T "$new" "$wanted" 2>/dev/null || rm -rf "$new"
    [[ -d $wanted ]] || fail "Azurite isn't in $wanted, although it is installed"
}
