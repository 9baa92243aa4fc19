#!/usr/bin/env bash
# Three sites and a server on this machine, each a process of its own, with TLS and a key for every site:
#
#   examples/flower/run_local.sh DIR ["round-timeout=60.0 ..."]
#
# DIR (new) gets certificates, keys, logs, and the run in DIR/run. PORT (8443): the server's; the three above it are the sites'.
# What it started, it stops, on Ctrl-C too.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
[ $# -ge 1 ] || { sed -n '2,7p' "$0"; exit 2; }
[ ! -e "$1" ] || { echo "$1: exists already; allowed: a new directory" >&2; exit 2; }
mkdir -p "$1"; dir="$(cd "$1" && pwd)"; more="${2:-}"; port="${PORT:-8443}"; sites=3
mkdir "$dir/server" "$dir/keys" "$dir/home"; for i in 0 1 2; do mkdir -p "$dir/site_$i"; done

export FLWR_HOME="$dir/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

started=() run=
stop() {
    trap - EXIT INT TERM
    [ -z "$run" ] || kill "$run" 2>/dev/null || true
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill -TERM -- "-${started[i]}" 2>/dev/null || true; done
    for pid in "${started[@]}"; do
        for _ in $(seq 50); do kill -0 -- "-$pid" 2>/dev/null || break; sleep 0.2; done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() {  # LOG COMMAND...: in a process group of its own, so that what it starts is stopped with it
    local log="$1"; shift
    setsid "$@" >"$log" 2>&1 </dev/null &
    started+=($!)
}

# 1. Certificates: an authority, and the server's, signed by it, for the name that sites reach it by.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 -subj "/CN=prefmesh authority" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$dir/server/ca.key" -out "$dir/server/ca.crt" 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=localhost" \
    -keyout "$dir/server/server.key" -out "$dir/server/server.csr" 2>/dev/null
openssl x509 -req -in "$dir/server/server.csr" -CA "$dir/server/ca.crt" -CAkey "$dir/server/ca.key" -CAcreateserial \
    -days 365 -out "$dir/server/server.crt" -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n') 2>/dev/null

# 2. A key for each site. openssl's PKCS8 keys are refused; ssh-keygen's are not.
for i in 0 1 2; do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "site_$i" -f "$dir/keys/site_$i"
done

# 3. The server.
start "$dir/server/superlink.log" flower-superlink --host 127.0.0.1 --port "$port" --enable-supernode-auth \
    --ssl-ca-certfile "$dir/server/ca.crt" --ssl-certfile "$dir/server/server.crt" --ssl-keyfile "$dir/server/server.key"
printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' \
    "$port" "$dir/server/ca.crt" >"$dir/home/config.toml"

# 4. The server takes the sites' public keys.
for i in 0 1 2; do
    for try in $(seq 60); do
        flwr supernode register "$dir/keys/site_$i.pub" here >"$dir/server/register_$i.log" 2>&1 && break
        [ "$try" -lt 60 ] || { cat "$dir/server/register_$i.log" >&2; exit 1; }
        kill -0 "${started[0]}" 2>/dev/null || { tail -5 "$dir/server/superlink.log" >&2; exit 1; }
        sleep 1
    done
done

# 5. The sites. Each keeps what lasts of a run in a directory of its own. DATA: a directory with a file for each; without it, each is
#    a resident of the built-in town.
for i in 0 1 2; do
    node="site=\"site_$i\" partition-id=$i memory=\"$dir/site_$i/memory\""
    [ -z "${DATA:-}" ] || node="$node data=\"$DATA/site_$i.jsonl\""
    start "$dir/site_$i/supernode.log" env FLWR_HOME="$dir/site_$i/home" flower-supernode --superlink "127.0.0.1:$port" \
        --root-certificates "$dir/server/ca.crt" --auth-supernode-private-key "$dir/keys/site_$i" \
        --port "$((port + 1 + i))" --node-config "$node"
done
printf '%s\n' "${started[@]}" >"$dir/pids"

# 6. The run.
flwr run "$here" here --stream --run-config "out=\"$dir/run\" $more" > >(tee "$dir/server/run.log") 2>&1 &
run=$!
wait "$run"  # in the background: a signal to the script alone is then heard at once
[ -f "$dir/run/summary.json" ] || { echo "$dir/run: no summary; see $dir/server/run.log" >&2; exit 1; }
echo "done: $dir/run"
