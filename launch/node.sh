#!/bin/bash
# Run by srun, once on every node: COMMAND, in the environment of LALIC_SETUP and within LALIC_CONTAINER.
#
# With LALIC_STOP_FILE, a signal to the job's steps becomes that file, which the ranks look for: the launcher, which
# such a signal would kill with its ranks, does not hear of it. The file is written again and again because a trainer
# that is just starting takes an old one away.

cd "$LALIC_FOLDER" || exit 1  # a container may begin elsewhere
# shellcheck source=/dev/null
if [ -n "${LALIC_SETUP:-}" ]; then . "$LALIC_SETUP" || exit 1; fi
read -r -a container <<< "${LALIC_CONTAINER:-}"
if [ -z "${LALIC_STOP_FILE:-}" ]; then exec "${container[@]}" "$@"; fi

signalled=
trap 'signalled=SIGUSR1' USR1
trap 'signalled=SIGTERM' TERM
(
  trap '' TERM USR1
  exec "${container[@]}" "$@"
) &
launcher=$!
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do
  if [ -n "$signalled" ]; then echo "$signalled" > "$LALIC_STOP_FILE"; fi
  sleep 1
done
again=0
wait "$launcher" || again=$?
if [ "$again" -ne 127 ]; then status=$again; fi
exit "$status"
