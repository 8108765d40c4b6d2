# shellcheck shell=bash
# What train.slurm and eval.slurm share; they source it, in the batch shell on the job's first node.
#
# From the scripts: root (the checkout), logs (folder of this attempt's logs).
# For the scripts:  job, restart, nodes, python, signalled, and the functions below.
# shellcheck disable=SC2154

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  # The number of one task of an array may be that of the whole array: scontrol would take it for all of them.
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
restart=${SLURM_RESTART_COUNT:-0}
nodes=$SLURM_JOB_NUM_NODES
# Inside a container there is no environment of the checkout.
python=${LALIC_PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -z "${LALIC_CONTAINER:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
fi
read -r -a srun_options <<< "${LALIC_SRUN:-}"
export LALIC_FOLDER=$PWD

signalled=
trap 'signalled=SIGUSR1' USR1
trap 'signalled=SIGTERM' TERM

refuse() { echo "error: $*" >&2; exit 2; }

# One line for people, without the user name and password of a URL.
say() { echo "$(date '+%F %T') job $job restart $restart: $*" | without_passwords; }

without_passwords() { sed -E 's#://[^/@[:space:]]*@#://#g'; }

# start_step OUTPUT COMMAND...: COMMAND once on every node, in the background; its process is $step.
start_step() {
  # The task of a node has all CPUs that the job has there: the launcher's ranks and their loaders share them. With the
  # job's number of CPUs per task it would have that many alone.
  env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK \
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    --output="$1" --open-mode=append "${srun_options[@]}" bash "$root/launch/node.sh" "${@:2}" &
  step=$!
}

# wait_for_step ACTION...: wait for $step; after a signal call ACTION every 2 s until the step is over or ACTION
# fails. Leaves $status: that of the step, or "late" where ACTION failed.
wait_for_step() {
  local again
  status=0
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do  # a trap ends `wait` early
    if [ -n "$signalled" ] && ! "$@"; then status=late; return; fi
    sleep 2
  done
  again=0
  wait "$step" || again=$?
  if [ "$again" -ne 127 ]; then status=$again; fi  # 127: the first wait has told it already
}

# What the attempt runs in, in $logs/environment.txt and $logs/node*.txt, and the kernels, built ahead of time.
# Returns 1 when a signal came meanwhile.
prepare() {
  mkdir -p "$logs" || exit 1
  {
    echo "job $job, restart $restart, submitted from ${SLURM_SUBMIT_DIR:-?} by ${SLURM_JOB_USER:-?}"
    echo "nodes $SLURM_JOB_NODELIST"
    echo "arguments $*" | without_passwords
    echo "code $(git -C "$root" rev-parse HEAD 2>/dev/null || echo 'no git checkout')"
    git -C "$root" status --short 2>/dev/null | sed 's/^/changed /'
    bash "$root/launch/variables.sh"
  } > "$logs/environment.txt"
  # Built once on every node, before the ranks start and would all build at the same time.
  start_step "$logs/node%n.txt" bash "$root/launch/describe.sh" "$root" "$python"
  wait_for_step end_step
  case $status in 138 | 143) signalled=${signalled:-SIGTERM} ;; esac  # SIGUSR1 or SIGTERM to the steps alone
  if [ "$status" != 0 ] && [ -z "$signalled" ]; then
    say "the kernels could not be built: the portable form is used where it may be, see $logs/node0.txt" >&2
  fi
  [ -z "$signalled" ]
}

end_step() { kill "$step" 2>/dev/null || true; }

# State of the job, e.g. RUNNING: another one while SLURM is ending or requeueing it by itself.
job_state() { scontrol show job "$job" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1; }

# Ask SLURM to start this job again, and end; SLURM's controller may be away for a moment.
requeue() {
  local pause
  for pause in 5 20 40; do
    if scontrol requeue "$job"; then exit 0; fi
    sleep "$pause"
  done
  say "cannot be requeued: submit again to go on" >&2
  exit 1
}
