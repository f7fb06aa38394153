"""Several processes, once for all tests that need them: each writes OUT/RANK.json

`launch` starts them, forked or by torchrun (`ranks.py OUT PARTS`; `PARTS` is JSON: for each part its
arguments), and gives what each process saw."""
import contextlib, io, json, os, socket, subprocess, sys, time, warnings
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
import torch.distributed as dist
from fastcore.xtras import working_directory
from torch.nn.parallel import DistributedDataParallel
from common import finite, printing_into, quiet
from fastai_callbacks_ext.all import TerminateOnNaN
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner

def launch(world, out, seconds, **parts):
    "Run `parts` in `world` processes; for each part, what each process saw"
    if not torch.cuda.is_available(): _forked(world, Path(out), seconds, parts)
    else: _torchrun(world, out, seconds, parts)
    seen = [json.loads((Path(out)/f'{r}.json').read_text()) for r in range(world)]
    return {k: [o[k] for o in seen] for k in parts}

cpus = {'CUDA_VISIBLE_DEVICES':'', 'ACCELERATE_USE_CPU':'1', 'OMP_NUM_THREADS':'1'}

def _torchrun(world, out, seconds, parts):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(world)]
    cmd = [*torchrun, __file__, out, json.dumps(parts)]
    res = subprocess.run(cmd, env=os.environ | cpus, capture_output=True, text=True, timeout=seconds)
    if res.returncode: raise RuntimeError(res.stderr[-3000:])

def _forked(world, out, seconds, parts):
    "As torchrun does it, but all has been imported already"
    with socket.create_server(('127.0.0.1', 0)) as o: port = o.getsockname()[1]
    def one(rank):
        os.environ |= cpus | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                                  LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        work(out, parts)
    said,end = [out/f'{r}.txt' for r in range(world)],time.monotonic()+seconds
    start = get_context('fork').Process
    processes = [start(target=printing_into, args=(partial(one, r), said[r])) for r in range(world)]
    for p in processes: p.start()
    for p in processes: p.join(end-time.monotonic())
    for p in processes: p.kill(), p.join()
    failed = [said[r].read_text()[-3000:] for r,p in enumerate(processes) if p.exitcode]
    if failed: raise RuntimeError('\n'.join(failed))

# --- the parts ----------------------------------------------------------------------------------
def nan(wheres):
    "The second process meets a NaN"
    return {where: _nan(where) for where in wheres}

def _nan(where):
    rank = dist.get_rank()
    learn = digits_learner([cb := TerminateOnNaN()], n=320, bs=32)
    learn.model = DistributedDataParallel(learn.model)
    answers = [cb.any_rank(flag) for flag in (False, rank==1, True)]
    if rank==1: learn.add_cb(PoisonBatch(batch=3, where=where))
    with quiet(learn), contextlib.redirect_stdout(io.StringIO()) as said: learn.fit(2)
    records = [(r.epoch, r.batch, r.iteration, r.why) for r in cb.records]
    weights = [p.tolist() for p in learn.model.parameters()]
    return dict(answers=answers, records=records, finite=finite(learn), weights=weights, said=said.getvalue())

def gradients(_):
    "The cases of distributed_gradients.py"
    from distributed_gradients import cases, run
    found = {}
    for name,case in cases.items():
        kwargs = case()
        found[name] = run(dist.get_rank(), *kwargs.pop('cbs'), **kwargs)
    return found

def stopping(_):
    "The cases of distributed_stopping.py"
    from distributed_stopping import cases, run
    return {what: run(what) for what in cases}

def checkpoint(_):
    "The cases of distributed_checkpoint.py"
    from distributed_checkpoint import cases, run
    without_gpu()
    return {name: run(name) for name in cases}

def safety(seeds):
    "The scenarios of distributed_safety.py"
    from distributed_safety import run
    return [run(seed) for seed in seeds]

def memory(_):
    "The cases of distributed_memory.py"
    from distributed_memory import run
    return run(dist.get_rank())

def contract(names):
    "What contract.py asks of the callbacks called `names` under fastai's `distrib_ctx`"
    import contract
    from contract import ext
    without_gpu()
    return {name: contract.attempt(contract.holds_in_ranks, getattr(ext, name)) for name in names}

def without_gpu():
    "fastai's `distrib_ctx` puts the indices of items on a GPU to send them; here they stay where they are"
    from fastai.distributed import DistributedDL
    def broadcast(self, t, rank):
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast

PARTS = dict(nan=nan, gradients=gradients, stopping=stopping, checkpoint=checkpoint, safety=safety,
             contract=contract, memory=memory)

def work(out, parts):
    "What each process does"
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    (folder := out/'work').mkdir(exist_ok=True)
    with working_directory(folder):
        found = {k: PARTS[k](args) for k,args in parts.items()}
    (out/f'{dist.get_rank()}.json').write_text(json.dumps(found))
    dist.destroy_process_group()

if __name__=='__main__': work(Path(sys.argv[1]), json.loads(sys.argv[2]))
