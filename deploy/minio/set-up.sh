#!/bin/sh
# Creates the bucket, and the workers' and tools' user with the rights in policy.json. Run it again to apply changes.
# It needs mc with an alias `store`, BUCKET, ACCESS_KEY and SECRET_KEY. The image of mc has little more than a shell.
set -eu

case $MC_HOST_store in
    *"//$ACCESS_KEY:"*) echo "AWS_ACCESS_KEY_ID is MinIO's administrator: choose another name for one of them in .env" >&2 && exit 1 ;;
esac
while IFS= read -r line; do
    case $line in *BUCKET*) line=${line%%BUCKET*}$BUCKET${line#*BUCKET} ;; esac
    printf '%s\n' "$line"
done <"${0%/*}/policy.json" >"${TMPDIR:-/tmp}/policy.json"

mc mb --ignore-existing "store/$BUCKET"
mc admin policy create store imagemill "${TMPDIR:-/tmp}/policy.json"
# Read from stdin, keys stay out of the process list.
printf '%s\n%s\n' "$ACCESS_KEY" "$SECRET_KEY" | mc admin user add store
# Attaching a policy twice is an error.
case $(mc admin user info --json store "$ACCESS_KEY") in
    *'"policyName"'*imagemill*) ;;
    *) mc admin policy attach store imagemill --user "$ACCESS_KEY" ;;
esac
