#!/usr/bin/env bash
# `make train`: one job on this machine, from a JSON file of questions to a better model.
#   deploy/scripts/train.sh MODEL STEPS SEED     (MODEL: tiny, smollm2, or a Hugging Face directory)
# SETTINGS="key=value …" are further settings, which win.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$1 steps=$2 seed=$3
coordinator=${COORDINATOR:-target/release/coordinator}

case "$model" in
  tiny)
    path=deploy/models/tiny template=qwen-chat train=deploy/data/train.json val=deploy/data/val.json
    # Two optimizer steps a training step: half of the 128 chains each.
    settings=(data.train_batch_size=16 agent.num_chains=8 agent.max_steps=4 actor_rollout_ref.actor.optim.lr=3e-4
      actor_rollout_ref.actor.ppo_mini_batch_size=64)
    ;;
  smollm2)
    deploy/scripts/setup_tools.sh
    tools=third_party/tools-venv/bin/python
    [ -f deploy/models/smollm2/config.json ] || $tools deploy/scripts/convert_smollm2.py
    mkdir -p runs/data
    for split in train:500 val:32; do
      file=runs/data/chain_sum_${split%:*}.json
      [ -f "$file" ] || $tools deploy/scripts/make_data.py --reasoning-gym chain_sum --seed 1 \
        --split "${split%:*}" --count "${split#*:}" --out "$file"
    done
    path=deploy/models/smollm2 template=chatml train=runs/data/chain_sum_train.json val=runs/data/chain_sum_val.json
    settings=(data.train_batch_size=4 agent.num_chains=4 agent.max_steps=3 actor_rollout_ref.actor.optim.lr=2e-6
      actor_rollout_ref.rollout.max_tokens=160 actor_rollout_ref.rollout.max_model_len=1024)
    ;;
  *)
    path=$model template=null train=deploy/data/train.json val=deploy/data/val.json
    settings=(data.train_batch_size=8 agent.num_chains=4 agent.max_steps=4 actor_rollout_ref.actor.optim.lr=1e-6)
    ;;
esac

exec "$coordinator" train \
  algorithm.adv_estimator=grpo data.train_files="$train" data.val_files="$val" \
  agent.agent_type=code agent.tools=[code_interpreter] agent.template="$template" agent.model_name_or_path="$path" \
  agent.backend=async_verl agent.reward_name=math_reward_format agent.use_agent=True \
  actor_rollout_ref.model.path="$path" \
  actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=mse \
  actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.entropy_coeff=0.001 \
  trainer.n_gpus_per_node=2 trainer.nnodes=1 trainer.total_training_steps="$steps" trainer.seed="$seed" \
  trainer.project_name=AgentRL trainer.experiment_name="$(basename "$model")-seed$seed" trainer.resume_mode=disable \
  "${settings[@]}" ${SETTINGS:-}
