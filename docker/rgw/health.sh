#!/usr/bin/env bash
# Healthy: the account may list each bucket. That asks the gateway, the OSD and, after a restart, the monitor.
set -euo pipefail
# shellcheck source=s3.sh
. /usr/local/lib/rgw/s3.sh
[[ -e $ready ]] || { echo "starting" >&2; exit 1; }
read_account
for path in / $(printf '/%s?max-keys=1 ' ${S3_BUCKETS:-}); do
  status=$(s3_request GET "$path" 3)
  [[ $status == 200 ]] || { echo "GET $path: $status" >&2; exit 1; }
done
