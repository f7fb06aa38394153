"A stand-in for CUDA graphs, as strict as they are: a replay runs what was noted, and no Python of the model"
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_waits = '_local_scalar_dense','nonzero','masked_select','_unique2','unique_dim','equal'

class _Tape(TorchDispatchMode):
    "Notes operations, and keeps what they overwrite"
    def __init__(self):
        super().__init__()
        self.calls,self.made,self.before = [],set(),{}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func).removeprefix('aten.').startswith(_waits) or _chooses(func, args):
            raise RuntimeError(f'{func} waits for the device')
        given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        for a in func._schema.arguments:
            if a.alias_info is not None and a.alias_info.is_write and a.name in given:
                for t in tree_flatten(given[a.name])[0]: self.keep(t)
        res = func(*args, **kwargs)
        known = {_storage(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        self.made |= {_storage(t) for t in tree_flatten(res)[0] if isinstance(t, Tensor)}-known    # no views
        self.calls.append((func, *tree_map(_address, (args, kwargs, res))))
        return res

    def keep(self, t):
        if _storage(t) in self.made or _storage(t) in self.before: return
        self.before[_storage(t)] = (t.untyped_storage(), t.untyped_storage().clone())

def _address(t):
    "The same memory, whatever the tensor gets as its `data` later"
    return t.detach() if isinstance(t, Tensor) else t

def _chooses(func, args):
    "Is it `x[mask]`, of which only the device knows the shape?"
    return str(func).startswith('aten.index.') and any(o is not None and o.dtype==torch.bool for o in args[1])

def _storage(t): return t.untyped_storage()._cdata

class _Recorded:
    def __init__(self, calls, outputs): self.calls,self.outputs = calls,outputs

    @torch.no_grad()
    def replay(self):
        for func,args,kwargs,noted in self.calls:
            res = func(*args, **kwargs)
            for new,old in zip(tree_flatten(res)[0], tree_flatten(noted)[0]):
                if isinstance(new, Tensor) and _storage(new)!=_storage(old): old.copy_(new)

    def reset(self): self.calls = self.outputs = None

class Tape:
    "As `CudaGraphs`: a capture changes nothing, a replay runs what was noted"
    def __init__(self, device): self.device = device
    def aside(self): return nullcontext()
    def close(self): pass

    def capture(self, f):
        tape,state = _Tape(),torch.get_rng_state()
        try:
            with tape: outputs = f()
        finally:
            for storage,before in tape.before.values(): storage.copy_(before)
            torch.set_rng_state(state)
        return _Recorded(tape.calls, [t.detach().as_subclass(Tensor) for t in outputs])
