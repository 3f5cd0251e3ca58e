# Remakes the θ (but for two VeLOs), tables and figures of results/. Run it in the repository root, or paste a line.
#
# Needed: requirements.txt and matplotlib; CIFAR-10 in data/ (add --download to the first line to
# fetch it) and, for the language model, data/tinyshakespeare.txt (github.com/karpathy/char-rnn,
# data/tinyshakespeare/input.txt). All of it takes many hours on two cores.
# Everything goes to runs/. To resume a killed script, run it again. The tables use the θ of results/.
# Results depend on rounding, and so on the machine: expect differences as large as std in the CSVs.
# Two figures of results/ show a selection: depth.png the μLO_M, LO_M, AdamW and μAdam of depth and
# depth-512, pre-activations.png the μLO_M and LO_M of pre-activations.

# θ by the paper's rules: μLO_M, LO_M, μLO_S and LO_S
python meta_train.py --dataset cifar10 --image-size 8 --widths 32 64 128 --pairs 4 --meta-steps 2500 --out runs/mulo_m --resume
python meta_train.py --dataset cifar10 --image-size 8 --widths 32 64 128 --pairs 4 --meta-steps 2500 --seed 1 --out runs/mulo_m_1 --resume
python meta_train.py --dataset cifar10 --image-size 8 --widths 32 64 128 --pairs 4 --meta-steps 2500 --parametrization sp --out runs/lo_m --resume
python meta_train.py --dataset cifar10 --image-size 8 --output-mult 1 --hidden-lr-mult 1 --step-mult 0.01 --meta-steps 2000 --pairs 8 --min-length 100 --max-offset 50 --out runs/mulo_s --resume
python meta_train.py --dataset cifar10 --image-size 8 --parametrization sp --meta-steps 2000 --pairs 8 --min-length 100 --max-offset 50 --out runs/lo_s --resume
python meta_train.py --dataset cifar10 --image-size 8 --batch-size 1024 --output-mult 1 --hidden-lr-mult 1 --step-mult 0.01 --meta-steps 2000 --pairs 8 --min-length 100 --max-offset 50 --out runs/mulo_s_1024 --resume
python meta_train.py --dataset cifar10 --image-size 8 --batch-size 1024 --parametrization sp --meta-steps 2000 --pairs 8 --min-length 100 --max-offset 50 --out runs/lo_s_1024 --resume

# θ of the README's first command
python meta_train.py --out runs/mulo_laptop --resume

# θ that are ours: base width 128; horizon; and the μLO that the VeLOs are compared with
python meta_train.py --first-theta results/mulo_m.npz --base-width 128 --dataset cifar10 --image-size 8 --widths 32 64 128 --pairs 4 --meta-steps 500 --learning-rate 5e-4 --final-learning-rate 1e-4 --warmup-steps 50 --out runs/mulo_m_128 --resume
python meta_train.py --first-theta results/mulo_m_1.npz --base-width 128 --dataset cifar10 --image-size 8 --widths 32 64 128 --pairs 4 --meta-steps 500 --learning-rate 5e-4 --final-learning-rate 1e-4 --warmup-steps 50 --seed 1 --out runs/mulo_m_128_1 --resume
python meta_train.py --start adam --learning-rate 1e-3 --final-learning-rate 5e-5 --base-width 128 --horizon 1000 --decay 1e-3 --dataset cifar10 --image-size 8 --widths 32 64 128 --pairs 4 --min-length 300 --max-length 6000 --max-offset 300 --meta-steps 2500 --out runs/mulo_m_long --resume
python meta_train.py --start adam --learning-rate 1e-3 --final-learning-rate 5e-5 --horizon 1000 --decay 1e-3 --parametrization sp --dataset cifar10 --image-size 8 --widths 32 64 128 --pairs 4 --min-length 300 --max-length 6000 --max-offset 300 --meta-steps 2500 --out runs/lo_m_long --resume
python meta_train.py --start adam --learning-rate 1e-3 --final-learning-rate 1e-4 --base-width 32 --pairs 8 --min-length 100 --max-offset 50 --meta-steps 800 --out runs/mulo_adam --resume

# velo_sp.npz and velo_mup.npz were meta-trained from a fresh VeLO by commit 68d7a60 of this repository:
#     python meta_train.py --optimizer velo --parametrization sp --step-mult 0.01
#     python meta_train.py --optimizer velo --step-mult 0.03
# This version of the code has no fresh VeLO. It can continue from these two: --first-theta FILE.

# Width
python evaluate.py --sweep width --widths 32 64 128 256 512 1024 2048 4096 --theta results/mulo_m.npz results/lo_m.npz results/mulo_m_128.npz --baselines adamw --tune both --tune-seeds 2 --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name width --plot
python evaluate.py --sweep width --widths 32 128 512 --theta results/mulo_m.npz results/mulo_m_128.npz results/mulo_m_1.npz results/mulo_m_128_1.npz --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name width-meta-seeds
python evaluate.py --sweep width --widths 32 128 512 --theta results/mulo_s.npz results/lo_s.npz results/mulo_m_long.npz --baselines muadam --tune both --tune-seeds 2 --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name width-others

# Depth
python evaluate.py --sweep depth --depths 3 6 12 16 --widths 32 128 --theta results/mulo_m.npz results/lo_m.npz results/mulo_m_128.npz --baselines adamw muadam --seeds 3 --dataset cifar10 --image-size 8 --out runs/reproduced --name depth --plot
python evaluate.py --sweep depth --depths 3 6 12 16 --widths 512 --theta results/mulo_m.npz results/lo_m.npz results/mulo_m_128.npz --baselines adamw muadam --seeds 3 --dataset cifar10 --image-size 8 --out runs/reproduced --name depth-512
python evaluate.py --sweep depth --depths 3 12 --widths 128 --task vit --patch 2 --theta results/mulo_m.npz results/lo_m.npz results/mulo_m_128.npz --baselines adamw --seeds 2 --dataset cifar10 --image-size 8 --out runs/reproduced --name depth-vit

# Horizon
python evaluate.py --sweep horizon --lengths 1000 5000 25000 --widths 128 --theta results/mulo_m.npz results/lo_m.npz results/mulo_s.npz results/lo_s.npz --baselines adamw --seeds 3 --dataset cifar10 --image-size 8 --out runs/reproduced --name horizon --plot
python evaluate.py --sweep horizon --lengths 1000 5000 25000 --widths 32 128 --batch-size 1024 --theta results/mulo_s_1024.npz results/lo_s_1024.npz --baselines adamw --tune-seeds 1 --seeds 2 --dataset cifar10 --image-size 8 --out runs/reproduced --name horizon-1024

# Pre-activations and coordinate check
python evaluate.py --sweep coordinate-check --steps 500 --widths 32 128 512 --theta results/mulo_m.npz results/lo_m.npz results/mulo_m_128.npz --seeds 2 --dataset cifar10 --image-size 8 --out runs/reproduced --name pre-activations --plot
python evaluate.py --sweep coordinate-check --steps 100 --widths 32 64 128 256 512 1024 --theta results/mulo_s.npz results/lo_s.npz results/mulo_m.npz results/mulo_m_128.npz --seeds 2 --dataset cifar10 --image-size 8 --out runs/reproduced --name coordinate-check

# Other networks
python evaluate.py --sweep width --widths 32 128 512 --task vit --patch 2 --theta results/mulo_m_128.npz --baselines adamw muadam --tune per-width --tune-seeds 1 --seeds 2 --dataset cifar10 --image-size 8 --out runs/reproduced --name vit
python evaluate.py --sweep width --widths 32 128 512 --task vit --patch 2 --theta results/mulo_m_128.npz --tune-theta input_mult output_mult hidden_lr_mult --tune-seeds 4 --seeds 2 --dataset cifar10 --image-size 8 --out runs/reproduced --name vit-tuned
python evaluate.py --sweep width --widths 32 128 512 --task lm --batch-size 16 --theta results/mulo_m_128.npz --baselines adamw muadam --tune per-width --tune-seeds 1 --seeds 2 --dataset text --data-dir data/tinyshakespeare.txt --out runs/reproduced --name lm
python evaluate.py --sweep width --widths 32 128 512 --task lm --batch-size 16 --theta results/mulo_m_128.npz --tune-theta input_mult output_mult hidden_lr_mult --tune-seeds 4 --seeds 2 --dataset text --data-dir data/tinyshakespeare.txt --out runs/reproduced --name lm-tuned

# Ours: cooldown; larger updates; long runs
python evaluate.py --sweep width --widths 32 64 128 256 512 1024 2048 4096 --cooldown 0.3 --theta results/mulo_m.npz results/lo_m.npz results/mulo_m_128.npz --baselines adamw_cosine --tune per-width --tune-seeds 2 --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name width-cooldown
python evaluate.py --sweep width --widths 32 64 128 256 512 1024 2048 --cooldown 0.3 --step-mult 0.004 --theta results/mulo_m_128.npz --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name width-step-mult
python evaluate.py --sweep width --widths 4096 --cooldown 0.3 --step-mult 0.004 --theta results/mulo_m_128.npz --seeds 3 --dataset cifar10 --image-size 8 --out runs/reproduced --name width-step-mult-4096
python evaluate.py --sweep horizon --lengths 1000 3000 10000 25000 --widths 128 --cooldown 0.3 --theta results/mulo_m_long.npz results/lo_m_long.npz --baselines adamw_decay adamw_cosine --tune per-width --tune-seeds 2 --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name horizon-planned
python evaluate.py --sweep horizon --lengths 1000 3000 10000 25000 --widths 512 --cooldown 0.3 --theta results/mulo_m_long.npz results/lo_m_long.npz --baselines adamw_decay adamw_cosine --tune per-width --tune-seeds 2 --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name horizon-512
python evaluate.py --sweep horizon --lengths 3000 10000 25000 --widths 128 512 --cooldown 0.3 --step-mult 0.004 --decay 1.2e-3 --theta results/mulo_m_long.npz --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name horizon-step-mult
python evaluate.py --sweep horizon --lengths 25000 --widths 128 512 --cooldown 0.3 --step-mult 0.0013333 --decay 1.2e-3 --theta results/lo_m_long.npz --seeds 5 --dataset cifar10 --image-size 8 --out runs/reproduced --name horizon-step-mult-lo

# VeLO
python evaluate.py --sweep width --widths 32 128 512 --theta results/velo_mup.npz results/velo_sp.npz results/mulo_adam.npz --baselines adamw --tune per-width --seeds 2 --out runs/reproduced --name velo
