#!/bin/sh
# Runs a command with the secrets that Prefect takes from its environment only: each is read from the file that
# <NAME>_FILE names, so that it stands in no image, no compose file and no listing of the engine.
set -eu
for name in PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING PREFECT_SERVER_DATABASE_USER \
            PREFECT_SERVER_DATABASE_PASSWORD; do
  eval "file=\${${name}_FILE:-}"
  [ -n "$file" ] || continue
  if ! value=$(cat "$file"); then
    echo "${name}_FILE: $file cannot be read by user $(id -u); make secrets creates it for MOVER_UID" >&2
    exit 2
  fi
  if [ -z "$value" ]; then
    echo "${name}_FILE: $file is empty" >&2
    exit 2
  fi
  export "$name=$value"
done
exec "$@"
