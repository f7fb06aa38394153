"""Train on several GPUs, a process on each (distributed data parallel, DDP)

    accelerate launch --num_processes 2 examples/recipes/two_gpus.py
    torchrun --nproc_per_node 2 examples/recipes/two_gpus.py --path runs/two_gpus

First `pip install accelerate`. Without GPUs: `ACCELERATE_USE_CPU=1 torchrun ...`."""
from fastai.vision.all import *
from fastai.distributed import *
from accelerate.utils import broadcast_object_list
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import digits_dls, digits_model

gpus = torch.cuda.is_available()
if not gpus:    # fastai sends the order of the items from GPU to GPU
    DistributedDL._broadcast = lambda self, t, rank: broadcast_object_list([t], rank)[0]

@call_parse
def main(
    path:Path='runs/two_gpus', # Folder for this run, which all processes can read
    epochs:int=3, # How often to go through the data
):
    set_seed(42)
    dls,model = digits_dls(bs=32),digits_model()    # 32 items for each process
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, path=path)
    with learn.distrib_ctx(sync_bn=gpus):
        learn.fit_one_cycle(epochs, 1e-2, cbs=[
            Checkpoint(path/'checkpoints'), PreemptionGuard(),  # one signal ends all
            SkipNonFinite(),        # a NaN in one process: all leave the batch out
            SaveTopK('accuracy')])  # of all together; the first process writes
    if rank_distrib()==0: learn.export('model.pkl')
