"A state on disk is complete or not there, however it is damaged and whenever its writer is killed"
import errno, hashlib, importlib.util, io, itertools, json, os, pickle, random, resource, signal, stat
import subprocess, sys, threading, time, zipfile
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.torch_core import TensorImage
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from cases import every_case
from common import forked
from fastai_callbacks_ext.base.files import (BackgroundWriter, DamagedFile, FolderLock, StateFiles,
                                             load_state, map_state, replacing, save_state)
from fastai_callbacks_ext.base.snapshot import Snapshot

torch.set_num_threads(1)     # a child forked beside a pool of threads hangs in its first large operation
STATE = {'model': OrderedDict(w=torch.arange(600.).view(20,30), b=torch.ones(7).half()),
         'rng': (3, (1, 2**200), None), 'name': 'é', 'ids': [1j, True, float('inf')]}
quick = settings(deadline=None, max_examples=60 if every_case else 25, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])

def bits(o):
    "Something that is equal if `o` is, to the last bit"
    if isinstance(o, Tensor):
        o = o.detach().to_dense() if o.is_sparse else o.detach()
        plain = o.resolve_conj().resolve_neg().contiguous().flatten().cpu()
        return str(o.dtype),tuple(o.shape),plain.view(torch.uint8).numpy().tobytes()
    if isinstance(o, dict): return type(o).__name__,[(bits(k), bits(v)) for k,v in o.items()]
    if type(o) in (list,tuple): return type(o).__name__,[bits(v) for v in o]
    return type(o).__name__,repr(o)

def problem(f, *args, **kwargs):
    "The line of the `DamagedFile` that this raises, None if it raises nothing"
    try: f(*args, **kwargs)
    except DamagedFile as e:
        assert '\n' not in str(e) and len(str(e))<300, e
        return str(e)

@contextmanager
def broken(monkeypatch, name, no, skip=0):
    "`os.<name>` fails with error number `no`, after `skip` calls"
    real,count = getattr(os, name),itertools.count()
    def f(*args, **kwargs):
        if next(count)==skip: raise OSError(no, os.strerror(no))
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(os, name, f)
        yield

def temps(folder): return [o.name for o in folder.rglob('*.tmp')]

# What can be kept
scalars = st.one_of(st.none(), st.booleans(), st.integers(-2**200, 2**200), st.floats(),
                    st.complex_numbers(), st.text(),
                    st.sampled_from([torch.Size([]), torch.Size([2,3]), torch.float16, torch.device('cpu')]))
dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
          torch.complex64]
bases = [torch.arange(24).to(d).view(2,3,4) for d in dtypes]
views = [lambda t: t, lambda t: t[1], lambda t: t[:,1:], lambda t: t.permute(2,0,1), lambda t: t[...,0],
         lambda t: t[:0], lambda t: t.view(-1)[5:9], lambda t: t.view(-1)[3],
         lambda t: t[None].expand(3,2,3,4), lambda t: t.view(-1)[::7], nn.Parameter, lambda t: t.clone(),
         lambda t: t.to_sparse(), TensorImage, lambda t: t.conj()]
tensors = st.builds(lambda t,view: t if view is nn.Parameter and not t.is_floating_point() else view(t),
                    st.sampled_from(bases), st.sampled_from(views))
states = st.recursive(st.one_of(scalars, tensors),
                      lambda o: st.one_of(st.lists(o), st.lists(o).map(tuple),
                                          st.dictionaries(scalars.filter(lambda k: k==k), o)), max_leaves=12)

@quick
@given(states)
def test_round_trip(tmp_path, state):
    want,facts = bits(map_state(state, lambda t: t)),save_state(tmp_path/'a', state)
    assert bits(load_state(tmp_path/'a', **facts))==want==bits(load_state(tmp_path/'a'))

class Custom: pass
class MyDict(dict): pass
numpys = [getattr(np, o)(1) for o in ('float64','int64','bool_','zeros','str_')]

@pytest.mark.parametrize('o', [
    Custom(), Custom, MyDict(), b'', bytearray(b'x'), {1}, range(3), print, object(), Path('x'),
    torch.Generator(), (c for c in 'x'), TwoTensor(torch.ones(2), torch.ones(2)), *numpys],
    ids=lambda o: type(o).__name__)
def test_refused_by_path(tmp_path, o):
    before = save_state(tmp_path/'a', STATE)
    name = f'{type(o).__module__}.{type(o).__qualname__}'
    for f in (partial(save_state, tmp_path/'a'), Snapshot().take):
        for state,path in (({'x': [0, (o,)]}, "state['x'][1][0]"), (o, 'state'),
                           (OrderedDict(y=o), "state['y']")):
            with pytest.raises(TypeError) as e: f(state)
            assert str(e.value).startswith(f'{path}: {name}')
    assert bits(load_state(tmp_path/'a', **before))==bits(STATE) and not temps(tmp_path)

def test_refuses_keys():
    with pytest.raises(TypeError, match=r"key of state\['x'\]: builtins.tuple"):
        map_state({'x': {(1,2): 3}}, lambda t: t)

def test_attributes_stay_behind(tmp_path):
    p = nn.Parameter(torch.ones(2))
    p.owner = Custom()
    save_state(tmp_path/'a', [p, TensorImage(torch.ones(2), owner=Custom())])
    assert [type(o) for o in load_state(tmp_path/'a')]==[Tensor, Tensor]

def test_versions_of_modules(tmp_path):
    state = nn.BatchNorm1d(3).state_dict()
    save_state(tmp_path/'a', state)
    assert load_state(tmp_path/'a')._metadata==state._metadata==Snapshot().take(state)._metadata

# Damage
def damages(good, seed, n):
    "Names and contents of damaged files"
    r = random.Random(seed)
    sizes = [0, 1, 2, 10, 29, 30, 63, 64, *(r.randrange(64, len(good)) for _ in range(20)),
             *(len(good)-o for o in (200,56,22,21,2,1))]
    yield from ((f'first {k}', good[:k]) for k in sizes)
    for i in range(n):
        at,bit = r.randrange(len(good)),1<<r.randrange(8)
        yield f'bit {bit} of byte {at}', good[:at]+bytes([good[at]^bit])+good[at+1:]
    for i in range(n//10):
        at,k = r.randrange(len(good)),r.choice((1, 4, 512))
        yield f'{k} zeros at {at}', good[:at]+bytes(k)+good[at+k:]
        yield f'{k} less at {at}', good[:at]+good[at+k:]
        yield f'{k} more at {at}', good[:at]+r.randbytes(k)+good[at:]
    yield 'twice', good+good

def test_damage(tmp_path):
    f = tmp_path/'a'
    facts = save_state(f, STATE)
    good,want,kinds = f.read_bytes(),bits(STATE),set()
    assert facts==dict(size=len(good), sha256=hashlib.sha256(good).hexdigest())
    for name,content in damages(good, 42, 400):
        f.write_bytes(content)
        if content==good: continue
        said = problem(load_state, f, **facts)
        assert said and said.startswith(f'{f}: '), name
        kinds.add(said.split(': ')[1].split(' ')[0])
        # bytes that mean nothing: padding, a date
        if not problem(load_state, f): assert bits(load_state(f))==want, name
    assert kinds=={'empty','truncated','its',f'{2*len(good):,}',*kinds}

def test_damage_of_content_needs_no_manifest(tmp_path):
    "Each bit of the tensors and of the structure is under a sum in the file itself"
    f = tmp_path/'a'
    save_state(f, STATE)
    good = f.read_bytes()
    with zipfile.ZipFile(f) as z: records = [(i.header_offset, i.file_size, z.read(i)) for i in z.infolist()]
    r = random.Random(1)
    for start,size,content in records:
        at = good.index(content, start)
        for i in r.sample(range(size), min(size, 20)):
            f.write_bytes(good[:at+i]+bytes([good[at+i]^1<<r.randrange(8)])+good[at+i+1:])
            assert problem(load_state, f)

class Trap:
    "Leaves a file where it is unpickled"
    def __init__(self, file): self.file = file
    def __reduce__(self): return open,(str(self.file),'w')

def foreign(d):
    "Names and contents of files that `save_state` did not write"
    trap = Trap(d/'code was run')
    def saved(f):
        b = io.BytesIO()
        f(b)
        return b.getvalue()
    def zipped(**files):
        def f(b):
            with zipfile.ZipFile(b, 'w') as z:
                for k,v in files.items(): z.writestr(k.replace('__', '/'), v)
        return saved(f)
    for protocol in range(pickle.HIGHEST_PROTOCOL+1):
        yield f'pickle {protocol}', pickle.dumps({'model': trap}, protocol)
    yield 'torch', saved(lambda b: torch.save({'model': trap}, b))
    yield 'old torch', saved(lambda b: torch.save({'model': trap}, b, _use_new_zipfile_serialization=False))
    yield 'custom class', saved(lambda b: torch.save(Custom(), b))
    yield 'module', saved(lambda b: torch.save(nn.Linear(2,2), b))
    yield 'script', saved(lambda b: torch.jit.save(torch.jit.script(nn.Linear(2,2)), b))
    yield 'zip', zipped(a='b')
    yield 'trap in a zip', zipped(archive__data__pkl=b'', **{'archive__data.pkl': pickle.dumps(trap, 2)})
    yield 'empty zip', zipped()
    for name,o in dict(text=b'hello\n'*100, json=b'{"a": 1}', elf=Path(sys.executable).read_bytes()[:9999],
                       noise=random.Random(0).randbytes(5000), zeros=bytes(5000)).items(): yield name,o

@pytest.mark.filterwarnings('ignore')
def test_foreign(tmp_path):
    f = tmp_path/'a.pt'
    for name,content in foreign(tmp_path):
        f.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        for kwargs in ({}, dict(size=len(content)), dict(size=len(content), sha256=sha256)):
            said = problem(load_state, f, **kwargs)
            assert said and said.startswith(f'{f}: '), (name, kwargs)
        states = StateFiles(tmp_path/name)
        states.save([1], {})
        states._file(2).write_bytes(content)            # with a manifest that vouches for it
        states._file(2, 'json').write_text(json.dumps(dict(size=len(content), sha256=sha256)))
        said = []
        assert states.load(said.append)==([1], {}) and len(said)==1
    assert not (tmp_path/'code was run').exists()
    with pytest.raises(Exception): torch.load(f, weights_only=False)
    torch.save(Trap(tmp_path/'code was run'), f)
    torch.load(f, weights_only=False)
    assert (tmp_path/'code was run').exists()           # the trap works

def test_names_the_class(tmp_path):
    torch.save(Custom(), tmp_path/'a')
    said = f'reading it would run {__name__}.Custom; code in a file is never run'
    assert problem(load_state, tmp_path/'a')==f'{tmp_path}/a: {said}'

def test_unreadable(tmp_path, monkeypatch):
    assert problem(load_state, tmp_path/'a')==f'{tmp_path}/a: missing'
    assert problem(load_state, tmp_path)==f'{tmp_path}: cannot be read: Is a directory'
    save_state(tmp_path/'a', STATE)
    with broken(monkeypatch, 'fstat', errno.EIO):
        assert problem(load_state, tmp_path/'a')==f'{tmp_path}/a: cannot be read: Input/output error'

# Writing
def test_order_of_the_steps(tmp_path, monkeypatch):
    "The content is on the disk before its name is, and the name before `save_state` returns"
    steps,fsync,replace = [],os.fsync,os.replace
    def log_fsync(fd):
        s = os.fstat(fd)
        steps.append('folder' if stat.S_ISDIR(s.st_mode) else s.st_size)
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', log_fsync)
    monkeypatch.setattr(os, 'replace', lambda *args: (steps.append('rename'), replace(*args)))
    size = save_state(tmp_path/'a', STATE)['size']
    assert steps==[size, 'rename', 'folder']

def test_mode_of_the_file(tmp_path):
    save_state(tmp_path/'a', STATE)
    (tmp_path/'b').write_text('')
    assert (tmp_path/'a').stat().st_mode==(tmp_path/'b').stat().st_mode

def unchanged(folder, facts): return bits(load_state(folder/'a', **facts))==bits(STATE) and not temps(folder)

@pytest.mark.parametrize('name,skip', [('fsync',0), ('replace',0)])
@pytest.mark.parametrize('no', [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_failed_write(tmp_path, monkeypatch, name, skip, no):
    facts = save_state(tmp_path/'a', STATE)
    with broken(monkeypatch, name, no, skip), pytest.raises(OSError) as e: save_state(tmp_path/'a', {'x': 1})
    assert str(e.value)==f'[Errno {no}] cannot write {tmp_path}/a: {os.strerror(no)}' and e.value.errno==no
    assert unchanged(tmp_path, facts)

def test_disk_that_fills_up(tmp_path):
    "The kernel stops the file at each of these sizes"
    facts = save_state(tmp_path/'a', STATE)
    def child():
        for n in [0, 1, 100, 1000, facts['size']//2, facts['size']-100, facts['size']-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
            with pytest.raises(OSError) as e: save_state(tmp_path/'a', STATE)
            assert str(e.value)==f'[Errno {errno.EFBIG}] cannot write {tmp_path}/a: File too large'
            assert unchanged(tmp_path, facts)
            with pytest.raises(OSError): StateFiles(tmp_path).save(STATE, {})
            assert not temps(tmp_path) and StateFiles(tmp_path).load() is None
    assert forked(child)==0

def test_no_permission(tmp_path):
    facts = save_state(tmp_path/'a', STATE)
    (tmp_path/'a').chmod(0o644)
    tmp_path.chmod(0o555)
    def child():
        for o in tmp_path.parents: assert os.stat(o)
        if os.geteuid()==0: os.seteuid(65534)
        for f in (tmp_path/'a', tmp_path/'new'/'a'):
            with pytest.raises(PermissionError) as e: save_state(f, {'x': 1})
            assert str(e.value)==f'[Errno {errno.EACCES}] cannot write {f}: Permission denied'
    parents = [o for o in (tmp_path, *tmp_path.parents)
               if o.stat().st_uid==os.geteuid() and not o.stat().st_mode&1]
    modes = {o:o.stat().st_mode for o in parents}
    for o in parents: o.chmod(0o755 if o!=tmp_path else 0o555)     # pytest's folders are closed to others
    try: assert forked(child)==0
    finally:
        for o,m in modes.items(): o.chmod(m)
        tmp_path.chmod(0o755)
    assert unchanged(tmp_path, facts)

def test_no_folder(tmp_path):
    facts = save_state(tmp_path/'a', STATE)
    for f,why in ((tmp_path/'a'/'b', 'Not a directory'), (tmp_path/'a'/'b'/'c', 'Not a directory'),
                  (tmp_path/('x'*300), 'File name too long')):
        with pytest.raises(OSError, match=f'cannot write {f}: {why}'): save_state(f, {'x': 1})
    (tmp_path/'d').mkdir()
    with pytest.raises(IsADirectoryError, match='cannot write'): save_state(tmp_path/'d', {'x': 1})
    assert unchanged(tmp_path, facts)

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted(tmp_path, error):
    facts = save_state(tmp_path/'a', STATE)
    with pytest.raises(error):
        with replacing(tmp_path/'a') as f:
            f.write(b'x')
            raise error
    assert unchanged(tmp_path, facts)

def test_interrupted_inside_torch(tmp_path, monkeypatch):
    "PyTorch hides what a file raises behind a RuntimeError"
    import fastai_callbacks_ext.base.files as files
    class Hash:
        n = 0
        def update(self, data):
            self.n += 1
            if self.n==7: raise KeyboardInterrupt
    facts = save_state(tmp_path/'a', STATE)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(files.hashlib, 'sha256', Hash)
        save_state(tmp_path/'a', {'x': 1})
    assert unchanged(tmp_path, facts)

def test_threads_write_the_same_file(tmp_path):
    states = [{'n': i, 'w': torch.full((50_000,), float(i))} for i in range(4)]
    def save(s):
        for _ in range(8): save_state(tmp_path/'a', s)
    threads = [threading.Thread(target=save, args=(s,)) for s in states]
    for t in threads: t.start()
    while any(t.is_alive() for t in threads):
        if (tmp_path/'a').exists(): got = load_state(tmp_path/'a'); assert bits(got)==bits(states[got['n']])
    assert not temps(tmp_path)

# Folders of states, and kills
def numbered(n, size=1000):
    return {'n': n, 'weights': torch.full((size,), float(n)), 'more': [torch.full((9,), n), str(n)]}

def check(folder, at_least, size=1000):
    "There is a complete state, at least this one, and no wrong word; its number"
    said = []
    res = StateFiles(folder).load(said.append)
    if res is None: assert at_least==0; return 0
    state,about = res
    n = about['n']
    assert n>=at_least and bits(state)==bits(numbered(n, size))
    assert all('it has no manifest' in o for o in said), said        # a manifest that had no time to come
    for o in folder.glob('??????.json'): assert o.with_suffix('.pt').exists(), 'a manifest without its state'
    return n

def save_forever(folder, pipe=None, size=1000):
    states = StateFiles(folder)
    n = (states.load(lambda o: None) or (None, {'n': 0}))[1]['n']
    while True:
        n += 1
        states.save(numbered(n, size), {'n': n})
        if pipe: os.write(pipe, n.to_bytes(4, 'little'))

def kill_at_step(k):
    "Kill this process before its `k`-th step on the disk"
    count = itertools.count()
    def wrap(f):
        def g(*args, **kwargs):
            if next(count)==k: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)
        return g
    for o,name in ((os,'open'), (os,'fsync'), (os,'replace'), (Path,'unlink')):
        setattr(o, name, wrap(getattr(o, name)))

def test_killed_at_each_step(tmp_path):
    "Before each step of two saves and a part of a third, which remove older ones"
    for k in range(26):
        folder = tmp_path/str(k)
        states = StateFiles(folder)
        for n in (1,2): states.save(numbered(n), {'n': n})
        assert forked(lambda: (kill_at_step(k), save_forever(folder)))==-signal.SIGKILL
        n = check(folder, 2)
        assert n==2+(k+4)//10           # of the ten steps of a save, the sixth gives the manifest its name
        states.save(numbered(n+1), {'n': n+1})
        assert check(folder, n+1)==n+1 and not temps(folder)
        assert len(list(folder.glob('*.json')))==2 and len(list(folder.glob('*.pt')))<=3

def test_killed_at_random(tmp_path):
    "kill -9 from outside, at any moment, again and again in the same folder"
    r,last,size = random.Random(3),0,300_000
    for i in range(15):
        out,into = os.pipe()
        if not (pid := os.fork()):
            try: save_forever(tmp_path, into, size)
            finally: os._exit(1)
        os.close(into)
        # in slow moments, too, some saves return
        if i%3==0: last = int.from_bytes(os.read(out, 4), 'little')
        time.sleep(r.uniform(0, .1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while b := os.read(out, 4): last = int.from_bytes(b, 'little')     # a save that had returned
        os.close(out)
        last = check(tmp_path, last, size)
    assert last>0
    StateFiles(tmp_path).save(numbered(last+1), {'n': last+1})
    assert not temps(tmp_path)

def test_keeps_the_last_that_is_good(tmp_path):
    "A damaged one does not count as one of those to keep"
    states = StateFiles(tmp_path, keep=2)
    for n in (1,2,3): states.save(numbered(n), {'n': n})
    states._file(3).write_bytes(b'')
    assert states.load(lambda o: None)[1]=={'n': 2}
    assert states.save(numbered(4), {'n': 4})==4
    states._file(4).write_bytes(b'')
    assert StateFiles(tmp_path).load(lambda o: None)[1]=={'n': 2}

def test_manifest_is_to_read_only(tmp_path):
    "What it says about the state is not what is loaded"
    states = StateFiles(tmp_path)
    states.save([1], {'epoch': 3})
    f = states._file(1, 'json')
    assert set(json.loads(f.read_text()))=={'saved','size','sha256','about'}
    f.write_text(f.read_text().replace('"epoch": 3', '"epoch": 4'))
    assert states.load()==([1], {'epoch': 3})
    f.write_text(f.read_text().replace('"size": ', '"size": 1'))
    said = []
    assert states.load(said.append) is None and 'truncated' in said[0]

@pytest.mark.parametrize('keep', [1, 2, 5])
def test_keep(tmp_path, keep):
    states = StateFiles(tmp_path/'x', keep)
    for n in range(1, 9):
        assert states.save(numbered(n), {'n': n})==n
        assert sorted(int(o.stem) for o in (tmp_path/'x').glob('*.pt'))==list(range(max(1, n+1-keep), n+1))
    assert StateFiles(tmp_path/'x', keep).save(numbered(9), {'n': 9})==9

def test_leaves_other_files_alone(tmp_path):
    others = ['best.pt', 'log.json', 'x.tmp', '1.pt', '000001-old.pt', '0001.json']
    for o in others: (tmp_path/o).write_text('mine')
    states = StateFiles(tmp_path, keep=1)
    for n in (1,2,3): states.save(numbered(n), {'n': n})
    assert {o.name for o in tmp_path.iterdir()}=={*others, '000003.pt', '000003.json'}
    assert check(tmp_path, 3)==3

@pytest.mark.parametrize('name,skip', [('fsync',0), ('fsync',2), ('replace',0), ('replace',1)])
def test_failed_save_loses_nothing(tmp_path, monkeypatch, name, skip):
    states = StateFiles(tmp_path, keep=1)
    states.save(numbered(1), {'n': 1})
    fails = pytest.raises(OSError, match=r'cannot write .*000002\.(pt|json): No space left')
    with broken(monkeypatch, name, errno.ENOSPC, skip), fails: states.save(numbered(2), {'n': 2})
    assert check(tmp_path, 1)==1 and not temps(tmp_path)
    states.save(numbered(3), {'n': 3})
    assert check(tmp_path, 3)==3

# Beside the training
def test_background_waits_and_tells():
    w,gate,n = BackgroundWriter(),threading.Event(),threading.active_count()
    done = []
    w.submit(lambda: (gate.wait(5), done.append(1)))
    assert w.busy and threading.active_count()==n+1
    threading.Timer(.05, gate.set).start()
    w.submit(lambda: done.append(2))            # after the first one
    w.close()
    assert done==[1,2] and not w.busy and w._thread is None
    w.close()

def test_background_error_surfaces_once(tmp_path):
    w = BackgroundWriter()
    def job(): save_state(tmp_path/'a'/'b', {}) if (tmp_path/'a').write_text('') is not None else 0
    for surface in (w.check, w.close, lambda: w.submit(lambda: None)):
        w.submit(job)
        w._thread.join()
        with pytest.raises(OSError, match='Not a directory'): surface()
        w.check(), w.close()
    w.submit(lambda: (tmp_path/'fine').write_text('x'))
    w.close()
    assert (tmp_path/'fine').exists()

def test_background_job_survives_the_end_of_the_program(tmp_path):
    code = (f"import sys, time; from fastai_callbacks_ext.base.files import *; w = BackgroundWriter()\n"
            f"def job(): time.sleep(.5); save_state({str(tmp_path/'a')!r}, {{'x': 1}})\n"
            f"w.submit(job); sys.argv.append(w)")
    subprocess.run([sys.executable, '-c', code], check=True)
    assert load_state(tmp_path/'a')=={'x': 1}

# Other people's files, other runs
def test_only_own_files_are_removed(tmp_path):
    "Others' files named as ours stay, and so do their temporary ones; what a save that was cut off left goes"
    theirs = {'000000.pt': b'weights of the paper', '000001.json': b'{"epoch": 1}', '999999.json': b'[]',
              '000003.tmp': b'x', 'mine.tmp': b'x', '000002.pt.tmp': b'x'}
    for name,content in theirs.items(): (tmp_path/name).write_bytes(content)
    s = StateFiles(tmp_path, keep=1)
    n = s.save([1], {})
    (tmp_path/f'{n:06}.json').unlink()       # as when the process dies between the two
    (tmp_path/f'{n+1:06}.pt.0123abcd.tmp').write_bytes(b'x')
    last = [s.save([i], {}) for i in range(3)][-1]
    own = {f'{last:06}.pt', f'{last:06}.json'}
    assert {o.name for o in tmp_path.iterdir()}==own | set(theirs)
    assert all((tmp_path/k).read_bytes()==v for k,v in theirs.items()) and s.load(lambda line: None)[0]==[2]
    s = StateFiles(tmp_path, fresh=True)
    s.save([4], {})
    there = {o.name for o in tmp_path.iterdir()}
    assert there > set(theirs) and not own & there

def test_a_lock_lets_one_in(tmp_path):
    "Of many processes that come at once, over and over, one has it at a time"
    folder,log = tmp_path/'run',tmp_path/'log'
    def use():
        lock = FolderLock(folder)
        while lock.take(): time.sleep(.001)
        with open(log, 'a') as f: f.write('in\n')
        time.sleep(.002)
        with open(log, 'a') as f: f.write('out\n')
        lock.release()
    def often():
        for _ in range(10): use()
    pids = []
    for _ in range(4):
        if not (pid := os.fork()):
            try: often(); os._exit(0)
            finally: os._exit(1)
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1]==0 for pid in pids)
    assert log.read_text()=='in\nout\n'*40 and not [*folder.glob('*')]

def test_a_lock_whose_folder_is_removed_under_it(tmp_path, monkeypatch):
    "The last holder removes the folder just before a newcomer opens the file in it: it is made again"
    folder,real = tmp_path/'run',os.open
    def opened(*args):
        monkeypatch.undo()
        folder.rmdir()
        return real(*args)
    monkeypatch.setattr(os, 'open', opened)
    lock = FolderLock(folder)
    assert lock.take() is None and (folder/'.checkpoint.lock').exists()
    lock.release()
    folder.mkdir()
    (folder/'.checkpoint.lock').symlink_to(tmp_path/'gone'/'.checkpoint.lock')
    with pytest.raises(FileNotFoundError): FolderLock(folder).take()

def test_a_system_without_fcntl(tmp_path, monkeypatch):
    "The module can be imported; a lock says that it cannot be had"
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    import fastai_callbacks_ext.base.files as files
    spec = importlib.util.spec_from_file_location('fastai_callbacks_ext.base.files_elsewhere', files.__file__)
    spec.loader.exec_module(elsewhere := importlib.util.module_from_spec(spec))
    with pytest.raises(OSError, match='no fcntl'): elsewhere.FolderLock(tmp_path).take()

def test_a_lock_that_is_another_file_each_time(tmp_path, monkeypatch):
    "As on a disk that does not know its own files again: it is no lock, and nobody waits for ever"
    monkeypatch.setattr('fastai_callbacks_ext.base.files._is_at', lambda *args: False)
    with pytest.raises(OSError, match='removed each time'): FolderLock(tmp_path/'run').take()
