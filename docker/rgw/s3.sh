# shellcheck shell=bash
# The account, and requests with it, for the entry point and the health check.

run_dir=/tmp/rgw
# shellcheck disable=SC2034 # of the scripts that read this one
ready=$run_dir/ready

# Into access_key and secret_key. The characters are those that need no quoting where the two go.
read_account() {
  local name file
  for name in S3_USER_FILE S3_PASSWORD_FILE; do
    file=${!name:-}
    [[ $file ]] || { echo "rgw: $name is not set" >&2; return 2; }
    [[ -r $file ]] || { echo "rgw: $name: user $(id -u) cannot read $file" >&2; return 2; }
  done
  access_key=$(<"$S3_USER_FILE") secret_key=$(<"$S3_PASSWORD_FILE")
  [[ $access_key =~ ^[A-Za-z0-9._@-]+$ ]] || { echo "rgw: S3_USER_FILE: letters, digits and . _ @ - only" >&2; return 2; }
  [[ $secret_key =~ ^[][A-Za-z0-9.,:\;_@~!#%^*=+/?{}\(\)-]+$ ]] ||
    { echo "rgw: S3_PASSWORD_FILE: printable characters without blanks, quotes and backslashes only" >&2; return 2; }
}

# user_document GIB: the account, which may store so much.
user_document() {
  printf '{"key":"user:development","data":{"user_id":"development","display_name":"development","type":"rgw",'
  printf '"max_buckets":1000,"op_mask":"read, write, delete",'
  printf '"user_quota":{"enabled":true,"check_on_raw":false,"max_size":%d,"max_objects":-1},' "$(($1 << 30))"
  printf '"keys":[{"user":"development","access_key":"%s","secret_key":"%s","active":true}]}}' "$access_key" "$secret_key"
}

# s3_request METHOD PATH: prints the status of the answer, 000 for none. curl reads the keys from its standard input.
s3_request() {
  printf 'user = "%s:%s"\n' "$access_key" "$secret_key" |
    curl -K - -sS --noproxy '*' --max-time "${3:-10}" --aws-sigv4 aws:amz:us-east-1:s3 -X "$1" \
      -o /dev/null -w '%{http_code}' "http://127.0.0.1:9000$2" 2>/dev/null || :
}
