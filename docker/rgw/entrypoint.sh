#!/usr/bin/env bash
# Ceph's S3 gateway with its monitor and its OSD, for development: one container, any user, data in /var/lib/rgw.
#
#   S3_USER_FILE, S3_PASSWORD_FILE   files that hold access key and secret key; changed ones count from the next start on
#   S3_BUCKETS                       buckets to have, separated by blanks; made once the gateway answers, then kept
#   RGW_GIB                          GiB that can be stored, from 4 on (default 8); more than that is refused as
#                                    QuotaExceeded. The store is a sparse file; a larger value makes it grow at a start.
#
# rgw-health says when all of that is so. SIGTERM ends gateway, OSD and monitor in this order; when one of them ends by
# itself the container does too, so that a restart policy brings back all three.
set -euo pipefail
umask 077
exec </dev/null
# shellcheck source=s3.sh
. /usr/local/lib/rgw/s3.sh

store=/var/lib/rgw
data=$store/data
gib=${RGW_GIB:-8}
block_bytes=
declare -A pids=()

say() { printf 'rgw: %s\n' "$*" >&2; }
give_up() { say "$*"; exit 2; }
alive() { [[ ${pids[$1]:-} ]] && kill -0 "${pids[$1]}" 2>/dev/null; }
start() { local name=$1; shift; "$@" & pids[$name]=$!; }

# The gateway first: nothing may be under way when the OSD goes. Each has its time, then it is killed: what was
# acknowledged is on disk already.
stop_all() {
  local name
  trap '' TERM INT
  for name in gateway osd monitor; do
    alive "$name" || continue
    kill -TERM "${pids[$name]}" 2>/dev/null || :
    for _ in {1..60}; do alive "$name" || break; sleep 0.05; done
    alive "$name" && kill -KILL "${pids[$name]}" 2>/dev/null
    wait "${pids[$name]}" 2>/dev/null || :
  done
}

# Waited for in the background: bash would otherwise look at a signal only when the command has ended. Its output counts
# when it fails.
step() { "$@" >"$run_dir/step.log" 2>&1 & wait "$!"; }
failed() { cat "$run_dir/step.log" >&2; say "$*"; return 1; }

check_settings() {
  local bucket
  [[ $gib =~ ^[1-9][0-9]{0,4}$ ]] && (( gib >= 4 )) || give_up "RGW_GIB: a whole number of GiB from 4 on is needed"
  block_bytes=$((gib * 3 << 29))  # the quota, and room behind it: see ceph.conf
  read_account || exit 2
  for bucket in ${S3_BUCKETS:-}; do
    [[ $bucket =~ ^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$ ]] || give_up "S3_BUCKETS: $bucket is no name of a bucket"
  done
  [[ -d $store && -w $store ]] || give_up "user $(id -u) cannot write to $store; the volume belongs to another one"
  [[ ! -e $data || -w $data ]] || give_up "the data in $store belong to user $(stat -c %u "$data"), not to $(id -u)"
  exec {lock}>"$store/lock"
  flock -n "$lock" || give_up "another container uses this volume"
}

# Made aside and renamed: a start that is interrupted leaves nothing that looks like a store.
create_store() {
  local new=$store/new
  rm -rf "$new"
  mkdir "$new" "$new/mon" "$new/osd"
  step monmaptool --create --clobber --fsid "$(ceph-conf fsid)" --addv a '[v1:127.0.0.1:6789]' "$run_dir/monmap" &&
    step ceph-mon --mkfs -i a --monmap "$run_dir/monmap" --mon-data "$new/mon" &&
    step ceph-osd --mkfs -i 0 --no-mon-config --osd-data "$new/osd" \
      --osd-uuid "$(</proc/sys/kernel/random/uuid)" --bluestore-block-size "$block_bytes" ||
    failed "no store could be made in $store"
  sync -f "$new"
  mv "$new" "$data"
}

grow_store() {
  local block=$data/osd/block
  (( $(stat -c %s "$block") < block_bytes )) || return 0
  say "the store grows to $gib GiB"
  truncate -s "$block_bytes" "$block"
  step ceph-bluestore-tool bluefs-bdev-expand --path "$data/osd" || failed "the store cannot grow"
}

# The monitor is told of the OSD and its place once. One that has just started may refuse: all can be repeated.
osd_new() {
  ceph --connect-timeout 10 osd new "$(<"$data/osd/fsid")" 0 &&
    ceph --connect-timeout 10 osd crush add osd.0 1.0 root=default host=s3
}
introduce_osd() {
  [[ ! -e $data/introduced ]] || return 0
  for _ in {1..10}; do
    step osd_new && { : >"$data/introduced"; return 0; }
    alive monitor || break
    sleep 0.5
  done
  failed "the monitor does not take the OSD"
}

# One user, made from a document on standard input: the secret stands in no argument. It is the same user with each pair
# of keys, so that its buckets stay its own; keys that it had before are gone. Made again only when something changed.
put_user() { user_document "$gib" | timeout 20 radosgw-admin -n client.rgw metadata put user:development; }
create_user() {
  local sum
  sum=$(user_document "$gib" | sha256sum)
  [[ $(cat "$data/user" 2>/dev/null) != "$sum" ]] || return 0
  for _ in {1..5}; do
    step put_user && { printf '%s\n' "$sum" >"$data/user"; return 0; }
    alive osd || break
    sleep 0.5
  done
  failed "no user could be made"
}

create_buckets() {
  local bucket status=000
  for bucket in ${S3_BUCKETS:-}; do
    for _ in {1..120}; do
      status=$(s3_request GET "/$bucket?max-keys=1")
      [[ $status != 404 ]] || status=$(s3_request PUT "/$bucket")
      [[ $status == 200 ]] && break
      [[ $status == 000 || $status == 5?? ]] && alive gateway || break
      sleep 0.25
    done
    [[ $status == 200 ]] || give_up "bucket $bucket: the gateway answers $status"
  done
}

trap 'say "stops"; stop_all; exit 0' TERM INT
trap 'status=$?; stop_all; exit "$status"' EXIT
check_settings
mkdir -p "$run_dir"
rm -f "$ready"
[[ -d $data ]] || create_store
grow_store
start monitor ceph-mon -f -i a
introduce_osd
start osd ceph-osd -f -i 0
create_user
start gateway radosgw -f -n client.rgw
create_buckets
: >"$ready"
say "S3 answers on port 9000, $gib GiB"
wait -n "${pids[@]}" || :
say "a daemon has ended by itself; so does the container"
exit 1
