#!/bin/bash
# Run by the launcher, once for every rank: COMMAND, with its output in a file of its own in LALIC_LOGS. What the first
# rank of a node says is in the node's log as well.
log=$LALIC_LOGS/rank${RANK:-0}.log
if [ "${LOCAL_RANK:-0}" != 0 ]; then exec "$@" >> "$log" 2>&1; fi
"$@" 2>&1 | tee -a "$log"
exit "${PIPESTATUS[0]}"
