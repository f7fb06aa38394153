"Run by torchrun: one process meets a NaN, all stop in the same batch; each writes it to OUT/RANK.json"
import json, os, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
import torch.distributed as dist
from fastai.basics import *
from fastai.callback.all import *
from torch.nn.parallel import DistributedDataParallel
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.core import ExtCallback
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner

out,where,alone = Path(sys.argv[1]),sys.argv[2],len(sys.argv)>3
rank = int(os.environ['RANK'])
dist.init_process_group('gloo')
default_device(False)       # several processes, and maybe one GPU
if alone: ExtCallback.any_rank = lambda self, flag: bool(flag)    # each for itself: the other one must hang

learn = digits_learner([TerminateOnNaN()], n=320, bs=32)
learn.model = DistributedDataParallel(learn.model)
answers = [learn.terminate_on_nan.any_rank(flag) for flag in (False, rank==1, True)]
if rank==1: learn.add_cb(PoisonBatch(batch=3, where=where))
with learn.no_bar(), learn.no_logging(): learn.fit(2)

records = [(r.epoch, r.batch, r.iteration, r.why) for r in learn.terminate_on_nan.records]
weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).double()
finite = all(t.isfinite().all().item() for t in learn.model.state_dict().values())
(out/f'{rank}.json').write_text(json.dumps(dict(answers=answers, records=records, finite=finite,
                                                weights=weights.tolist())))
dist.destroy_process_group()
