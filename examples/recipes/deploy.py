"""From training to a file that can be loaded where this package is not installed

    python examples/recipes/deploy.py --path runs/deploy

Then, where fastai is: `load_learner('runs/deploy/model.pkl').predict('digit.png')`."""
from fastai.vision.all import *
from fastai_callbacks_ext.all import *
from sklearn.datasets import load_digits

def digits(folder):
    "Some of scikit-learn's digits as files, in a folder for each class"
    data = load_digits()
    for i,(x,y) in enumerate(zip(data.images[:400], data.target)):
        (folder/str(y)).mkdir(exist_ok=True)
        Image.fromarray((x*15).astype('uint8')).save(folder/str(y)/f'{i:03}.png')
    return folder

@call_parse
def main(
    path:Path='runs/deploy', # Folder for the files
    epochs:int=6, # How often to go through the data
):
    set_seed(42)
    # the file has names of functions, not their code: use fastai's own in the `dls`
    folder = digits(Path(tempfile.mkdtemp()))
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.2, seed=42, bs=32)
    model = nn.Sequential(ConvLayer(3, 16), ConvLayer(16, 32, stride=2),
                          nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, dls.c))
    learn = Learner(dls, model, metrics=accuracy, path=path, cbs=[EMA(), FastLoop()])
    learn.fit_one_cycle(epochs, 3e-2, cbs=SaveTopK('accuracy', k=1))
    # for fastai: transforms, classes, and the best averaged weights
    learn.export('model.pkl')
    # for PyTorch, the weights alone: model.load_state_dict(torch.load('weights.pth'))
    torch.save(learn.model.state_dict(), path/'weights.pth')
