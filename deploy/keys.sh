#!/bin/sh
# The keys of a cluster of containers, for the service `keys` of compose.yaml. What is missing is made: an
# authority, certificates, the token of an administrator. Then each kind of process is given what it needs and
# nothing else, in a volume of its own. Called again it hands out what has changed; running processes take that.
#
#   keys.sh                 make and hand out
#   keys.sh ca              write the certificate of the authority
#   keys.sh admin-token     write the token of the administrator
#   keys.sh COMMAND …       phalanx certs … or phalanx token …, then hand out
set -eu
umask 077
volumes=${PHALANX_KEYS:-/var/lib/phalanx-keys}
# The folder that `--dir` and the file that `--tokens` of phalanx stand for by default.
cd "$volumes/authority"
all=keys

make_missing() {
    if [ ! -e "$all/ca.key" ]; then
        set --
        for host in ${PHALANX_HOSTS:-}; do set -- "$@" --host "$host"; done
        phalanx certs init "$@" >&2
    fi
    if [ ! -e admin.token ]; then
        # A token that nobody was told of, where this was ended between the two.
        if [ -e tokens.json ]; then phalanx token revoke admin >&2 || true; fi
        phalanx token create admin --role admin --permission code > admin.token.new
        mv admin.token.new admin.token
    fi
}

# Whole files only: processes look at any time.
give() {
    if ! cmp -s "$1" "$2"; then
        cp "$1" "$2.new"
        mv "$2.new" "$2"
    fi
}

hand_out() {
    for kind in control storage aggregator worker; do
        to=$volumes/$kind
        give "$all/ca.pem" "$to/ca.pem"
        give "$all/$kind.key" "$to/node.key"
        give "$all/$kind.pem" "$to/node.pem"
    done
    # Hashes, for those whom people call.
    give tokens.json "$volumes/control/tokens.json"
    give tokens.json "$volumes/storage/tokens.json"
}

make_missing
case "${1:-}" in
    '') ;;
    ca) cat "$all/ca.pem" ;;
    admin-token) cat admin.token ;;
    *) phalanx "$@" ;;
esac
hand_out
