"The recipes as users run them, and the page that shows them"
import ast, os, re, runpy, signal, socket, sys, threading, time
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.learner import load_learner
from fastcore.nbio import read_nb
import fastai.vision.all, fastai.text.all, fastai.tabular.all     # once for all processes
import fastai_callbacks_ext.all as ext
from common import exit_code
from fastai_callbacks_ext.base.files import StateFiles, load_state

root = Path(__file__).parent.parent
recipes = {f.stem: f for f in sorted((root/'examples'/'recipes').glob('*.py'))}
page = read_nb(root/'nbs'/'guide'/'recipes.ipynb').cells

def run(name, *args):
    "What `python examples/recipes/NAME.py ARGS` runs, in this process; its globals"
    before,sys.argv = sys.argv,[f'{name}.py', *map(str, args)]
    try: return runpy.run_path(str(recipes[name]), run_name='__main__')
    finally: sys.argv = before

def run_and_die(name, *args, folder, after, sig):
    "The same; a signal ends the process soon after a checkpoint in `folder` that is later than `after`"
    def watch():
        while newest(folder)<=after: time.sleep(0.005)
        os.kill(os.getpid(), sig)
    threading.Thread(target=watch, daemon=True).start()
    run(name, *args)

def newest(folder): return max((int(f.stem) for f in folder.glob('*.json')), default=0)

def rows(out, column):
    "A column of the table that was printed, and the names of all columns"
    lines = [l.split('\r')[-1].split() for l in out.splitlines()]
    header = next(l for l in lines if l[:1]==['epoch'])
    return [float(l[header.index(column)]) for l in lines if len(l)==len(header) and l[0].isdigit()],header

def same_weights(*files):
    a,b = [load_learner(f).model.state_dict() for f in files]
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- the scripts --------------------------------------------------------------------------------
@pytest.mark.parametrize('name', recipes)
def test_short_and_explained(name):
    "What it shows, how to run it; it fits the page; its options say what they are for"
    src = recipes[name].read_text()
    assert src.count('\n')<40 and max(map(len, src.splitlines()))<=88
    doc = ast.get_docstring(ast.parse(src))
    assert len(doc.splitlines()[0])>30 and f'examples/recipes/{name}.py' in doc
    assert f"path:Path='runs/{name}', # " in src

def test_spot_instance(tmp_path, capfd):
    "Killed, then ended by a signal, then run to its end: the weights of a run that nothing happened to"
    options,checkpoints = ('--path', tmp_path/'run', '--epochs', 8),tmp_path/'run'/'checkpoints'/'fit_0'
    for sig,said in ((signal.SIGKILL, 'epoch'), (signal.SIGTERM, 'ended the fit')):
        dies = partial(run_and_die, 'spot_instance', *options, folder=checkpoints,
                       after=newest(checkpoints), sig=sig)
        assert exit_code(dies)==-sig
        assert said in capfd.readouterr().out and not (tmp_path/'run'/'model.pkl').exists()
    assert exit_code(partial(run, 'spot_instance', *options))==0
    assert 'checkpoint: resumed in epoch' in capfd.readouterr().out
    run('spot_instance', '--path', tmp_path/'whole', '--epochs', 8)
    assert same_weights(tmp_path/'run'/'model.pkl', tmp_path/'whole'/'model.pkl')
    assert exit_code(partial(run, 'spot_instance', *options))==0
    assert 'found the fit finished' in capfd.readouterr().out

def test_vision(tmp_path, capfd):
    "The best of the averaged models is exported; nothing complains"
    run('vision', '--path', tmp_path, '--epochs', 1, '--size', 16)
    out = capfd.readouterr().out
    told = {l.split(':')[0] for l in out.splitlines() if re.match(r'[a-z_]+: ', l)}
    assert told=={'ema'} and out.count('ema: left the averaged weights in the model')==2
    assert {f.name for f in (tmp_path/'checkpoints').glob('fit_*')}=={'fit_0','fit_1'}
    best,model = load_state(tmp_path/'models'/'model.pth'),load_learner(tmp_path/'model.pkl').model
    model = model.state_dict()
    assert best.keys()==model.keys() and all(torch.equal(best[k], model[k]) for k in best)

def test_language_model(tmp_path, capfd):
    "The penalties are in the table, and the perplexity is that of the best epoch"
    (tmp_path/'text.txt').write_text(('the cat sat on the mat . a dog ran to the cat . '*800)[:20_000])
    run('language_model', '--path', tmp_path, '--text', tmp_path/'text.txt', '--epochs', 2)
    out = capfd.readouterr().out
    perplexities,header = rows(out, 'perplexity')
    assert {'ar','tar'}<={*header} and len(perplexities)==2 and min(perplexities)<15
    assert f'perplexity of the best epoch: {min(perplexities):.1f}' in out

def test_tabular(tmp_path, capfd):
    "It stops early, with the weights of the best epoch"
    run('tabular', '--path', tmp_path)
    out = capfd.readouterr().out
    errors,_ = rows(out, '_rmse')
    assert 6<=len(errors)<50 and np.argmin(errors)==len(errors)-6 and min(errors)<60
    assert 'early_stopping: loaded the best weights' in out
    assert f'RMSE of the best epoch: {min(errors):.2f}' in out and (tmp_path/'model.pkl').exists()

def rank(i, port, *args):
    "What `torchrun` starts"
    env = dict(RANK=i, LOCAL_RANK=i, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR='localhost',
               MASTER_PORT=port)
    os.environ |= {k: str(v) for k,v in env.items()}
    run('two_gpus', *args)

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def test_two_gpus(tmp_path, monkeypatch, capfd):
    "Two processes on the CPU: one prints and writes, both are in the checkpoint"
    pytest.importorskip('accelerate')
    for k,v in dict(ACCELERATE_USE_CPU='1', CUDA_VISIBLE_DEVICES='').items(): monkeypatch.setenv(k, v)
    how = 'spawn' if torch.cuda.is_available() else 'fork'
    args = free_port(),'--path',tmp_path,'--epochs',2
    torch.multiprocessing.start_processes(rank, args, nprocs=2, start_method=how)     # raises what they raise
    out = capfd.readouterr().out
    assert len(rows(out, 'accuracy')[0])==2 and out.count('valid_loss')==1
    state,about = StateFiles(tmp_path/'checkpoints'/'fit_0').load(print)
    assert len(state['own'])==2 and about['at']['epoch']==2
    assert len(list((tmp_path/'models'/'model').glob('*.pth')))==2 and (tmp_path/'model.pkl').exists()

class _Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]==ext.__name__.split('.')[0]: raise ModuleNotFoundError(name, name=name)

def predict_without_the_package(folder):
    for o in [o for o in sys.modules if o.startswith('fastai_callbacks_ext')]: del sys.modules[o]
    sys.meta_path.insert(0, _Missing())
    learn = load_learner(folder/'model.pkl')
    image = folder/'digit.png'
    label,_,probs = learn.predict(image)
    assert label in map(str, range(10)) and not any(o.startswith('fastai_callbacks_ext') for o in sys.modules)
    weights = torch.load(folder/'weights.pth')      # of tensors alone
    state = learn.model.state_dict()
    assert weights.keys()==state.keys() and all(torch.equal(weights[k], state[k]) for k in weights)

def test_deploy(tmp_path):
    "Loaded by a process that cannot import this package; it reads images"
    g = run('deploy', '--path', tmp_path, '--epochs', 2)
    (tmp_path/'images').mkdir()
    next(g['digits'](tmp_path/'images').rglob('*.png')).rename(tmp_path/'digit.png')
    assert exit_code(partial(predict_without_the_package, tmp_path))==0

def test_kfold(tmp_path, capfd):
    "Killed in its second fold: the first is not trained again, and the predictions are the same"
    options = '--folds',2,'--epochs',4
    killed = partial(run_and_die, 'kfold', '--path', tmp_path/'run', *options,
                     folder=tmp_path/'run'/'fold_1'/'fit_0', after=0, sig=signal.SIGKILL)
    assert exit_code(killed)==-signal.SIGKILL
    capfd.readouterr()
    assert exit_code(partial(run, 'kfold', '--path', tmp_path/'run', *options))==0
    out = capfd.readouterr().out
    assert out.count('found the fit finished')==1 and out.count('resumed')==1
    run('kfold', '--path', tmp_path/'whole', *options)
    got,want = [np.load(tmp_path/o/'oof.npy') for o in ('run','whole')]
    assert np.array_equal(got, want) and (want!=0).all()

def test_by_layers(tmp_path, capsys):
    "It learns, says what it does, and the export has the averaged weights"
    run('by_layers', '--path', tmp_path, '--epochs', 6)
    out = capsys.readouterr().out
    assert float(re.search(r'accuracy (\d\.\d+) at a rate', out)[1])>.8
    said = 'hyper_mult: multiplies lr by','freezing: trains','cut_mix_up: mixes no more'
    assert all(o in out for o in said)
    assert type(load_learner(tmp_path/'model.pkl').model) is torch.nn.Sequential

def test_wrong_labels(tmp_path, capfd):
    "Most of what was planted is found; the learner is as it should be; a page is written"
    run('wrong_labels', '--path', tmp_path)
    out = capfd.readouterr().out
    assert int(re.search(r'(\d+) of 60 wrong labels are', out)[1])>=48
    assert 'wrong  ' not in out.split('epoch')[0] and len(list(tmp_path.glob('*.html')))==1

def test_from_fastai(tmp_path, capfd):
    "Ours of the same names do the work, and files have the same names"
    g = run('from_fastai', '--path', tmp_path)
    assert 'upgrade: SaveModelCallback -> SaveTopK' in capfd.readouterr().out
    shared = 'TerminateOnNaNCallback','EarlyStoppingCallback','GradientClip','GradientAccumulation'
    assert all(g[o] is getattr(ext, o) for o in shared)
    assert (tmp_path/'models'/'best.pth').exists() and (tmp_path/'history.csv').exists()

# --- the page -----------------------------------------------------------------------------------
def test_page_shows_the_files():
    "Each script has a section, and the stored output is the file"
    shown = {}
    for c in page:
        if c.cell_type=='code' and (name := re.search(r"show\('(\w+)'\)", c.source)):
            assert c.source.startswith('#| echo: false')
            shown[name[1]] = ''.join(c.outputs[0].data['text/markdown'])
    assert shown=={k: f'```python\n{f.read_text()}```' for k,f in recipes.items()}
    heads = [c.source.splitlines()[0] for c in page if c.cell_type=='markdown' and c.source.startswith('## ')]
    assert len(heads)==len(recipes)
