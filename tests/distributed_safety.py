"""Run by torchrun: seeded fits in which one process meets a fault; each writes what is left to OUT/RANK.json

`python tests/distributed_safety.py --scenarios 200` is the soak, with 2 and with 4 processes."""
import argparse, contextlib, hashlib, io, json, os, random, subprocess, sys, tempfile, time, warnings
from datetime import timedelta
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
import torch.distributed as dist
from fastai.basics import *
from fastai.callback.all import *
from fastai.callback.fp16 import MixedPrecision
from torch.nn.parallel import DistributedDataParallel
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner
from ranks import without_gpu

class BFloat16(MixedPrecision):
    "fastai's, on the CPU"
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', dtype=torch.bfloat16),[]
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=False)

class Spike(Callback):
    "Multiplies the loss of a batch"
    order = -20
    def __init__(self, batch): self.batch = batch
    def after_loss(self):
        if not (self.training and self.train_iter==self.batch): return
        self.learn.loss_grad,self.learn.loss = self.loss_grad*1e4,self.loss*1e4

def scenario(seed, world):
    "Callbacks for all processes, the fault, and the process that meets it"
    r = random.Random(seed)
    guard = r.choice([TerminateOnNaN, lambda: TerminateOnNaN(every=3, snapshot=3), SkipNonFinite,
                      lambda: SkipNonFinite(max_total=1, snapshot=2),
                      lambda: SpikeGuard(warmup=5),
                      lambda: SpikeGuard(watch=('loss','grad_norm'), warmup=5, action='rollback', snapshot=3,
                                         lr_factor=.5),
                      lambda: SpikeGuard(warmup=5, watch='loss', action='clip')])
    beside = r.choice([list, lambda: [FastLoop()], lambda: [GradientAccumulation(32)],
                       lambda: [GradientClip(0.5)], lambda: [BFloat16()],
                       lambda: [SkipNonFinite(), TerminateOnNaN()]])
    where = r.choice(['input','loss','grad','weight','spike'])
    batch,value = r.randrange(20),r.choice([float('nan'),float('inf')])
    cbs = [guard(), *beside()]
    cbs = [cb for i,cb in enumerate(cbs) if type(cb) not in map(type, cbs[:i])]
    fault = Spike(batch) if where=='spike' else PoisonBatch(tuple({batch, r.randrange(20)}), where, value)
    return cbs,fault,r.randrange(world)

def run(seed, distrib=False):
    "What is left of one fit, with other data for each process, or under fastai's `distrib_ctx`"
    rank,world = dist.get_rank(),dist.get_world_size()
    cbs,fault,bad = scenario(seed, world)
    learn = digits_learner(cbs + [fault]*(rank==bad), n=200*(world if distrib else 1), bs=16)
    if not distrib:
        learn.model = DistributedDataParallel(learn.model)
        learn.dls.train.rng.seed(rank)
    ctx = learn.distrib_ctx(sync_bn=False) if distrib else contextlib.nullcontext()
    quiet = contextlib.redirect_stdout(io.StringIO())
    with learn.no_bar(), learn.no_logging(), quiet as out, ctx: learn.fit(2)
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    told = [(r.callback, r.what.split()[0], r.iteration) for r in interventions(learn)]
    return dict(seed=seed, cbs=[cb.name for cb in cbs], bad=bad,
                finite=all_finite([learn.model.state_dict(),
                                   [list(s.values()) for s in learn.opt.state.values()]]),
                weights=hashlib.sha256(weights.numpy().tobytes()).hexdigest(), told=told,
                lines=out.getvalue().count('\n'))

def check(found):
    "What is wrong with what the processes were left with"
    for ranks in zip(*found):
        a = ranks[0]
        if not all(o['finite'] for o in ranks): yield f"{a['seed']}: not finite: {a}"
        if len({o['weights'] for o in ranks})>1: yield f"{a['seed']}: weights differ: {ranks}"
        if any(o['told']!=a['told'] for o in ranks): yield f"{a['seed']}: acted in different batches: {ranks}"
        if any(o['lines'] for o in ranks[1:]): yield f"{a['seed']}: more than one process speaks"

def launch(world, first, n, seconds, distrib=False):
    "Run `n` scenarios in `world` processes; what each process found"
    with tempfile.TemporaryDirectory() as out:
        cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(world),
               __file__, '--out', out, '--first', str(first), '--scenarios', str(n), *['--distrib']*distrib]
        env = dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', CUDA_VISIBLE_DEVICES='',
                   ACCELERATE_USE_CPU='1')
        res = subprocess.run(cmd, env=os.environ|env, capture_output=True, text=True, timeout=seconds)
        if res.returncode: raise RuntimeError(res.stderr[-3000:])
        return [json.loads((Path(out)/f'{r}.json').read_text()) for r in range(world)]

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--scenarios', type=int, default=200)
    p.add_argument('--first', type=int, default=0)
    p.add_argument('--distrib', action='store_true', help="under fastai's distrib_ctx")
    p.add_argument('--out', type=Path)
    args = p.parse_args()
    if args.out:
        dist.init_process_group('gloo', timeout=timedelta(seconds=60))
        if args.distrib: without_gpu()
        seen = [run(s, args.distrib) for s in range(args.first, args.first+args.scenarios)]
        (args.out/f'{dist.get_rank()}.json').write_text(json.dumps(seen))
        dist.destroy_process_group()
        sys.exit()
    start,problems,acted = time.time(),[],0
    half = args.scenarios//2
    for world,first,n in ((2, 0, half), (4, half, args.scenarios-half)):
        found = launch(world, first, n, 3600, args.distrib)
        problems += check(found)
        acted += sum(bool(o['told']) for o in found[0])
    print(*problems, sep='\n')
    print(f'{args.scenarios} scenarios with 2 and 4 processes in {time.time()-start:.0f} s: no hang, '
          f'a guard acted in {acted}; {len(problems)} problems')
    sys.exit(bool(problems))
