"""A run folder, opened for pandas and numpy: its images, clusters, training, embeddings and results.

``open_run(folder)`` returns a :class:`Run`. Its methods only read published artifacts and change nothing; for a missing
artifact a ValueError names the command that makes it, and for a damaged file the command that repairs it (sizes are
always checked, digests once for each file and time stamp). Columns with few different texts (domain, split, model,
granularity ...) are categorical.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from grappa.core.home import expanded
from grappa.images.splits import chosen_rows
from grappa.pipeline.config.schema import Config, num_clusters_of
from grappa.pipeline.engine.live.collection import live_assignments, live_embeddings, live_images
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.verdict_file import (
    VERDICT,
    Verdict,
    deployed_in,
    fused_granularities,
    read_verdict,
)
from grappa.pipeline.graph.models import evaluated_models, final_node
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import find_stage, nodes
from grappa.pipeline.store.artifacts import (
    RunFolder,
    check_same_origin,
    published,
    quoted,
    readable_manifest,
)
from grappa.pipeline.store.csv_cells import with_unguarded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Which = Literal["test", "train", "all"]
BLOCK_ROWS = 65536
NEAR_DUPLICATE = 0.98
NAMES = ("model", "granularity", "domain", "gallery")
# The settings by which a run gets artifacts that are no part of every run.
ASKING = {
    "objects": "objects.provider=backbone",
    "attention/views": "fusion.pairs=[neighbors,views]",
    "student": "model.source=fused",
}


def open_run(folder: str | Path) -> Run:
    """Open a run folder, finished or not; ValueError for a folder that is no run."""
    return Run(RunFolder.open(Path(expanded(folder))).root)


@dataclass(frozen=True)
class Run:
    """A run folder; row i of every array is row i of ``images()``.

    Methods with the argument ``live`` give, where it is True, the collection as it is now: without the images that
    `grappa remove` took out, and with those that `grappa add` brought, behind the run's own. Row i of such an array is
    row i of ``images(live=True)``.
    """

    root: Path

    @property
    def config(self) -> Config:
        """The configuration that ``config.yaml`` holds now."""
        return read_config(self._folder)

    # ---------------------------------------------------------------- images

    def images(self, *, live: bool = False) -> pd.DataFrame:
        """Return the images of the run, without rejected files: index image_id.

        Columns: file (str, the absolute path that opens), path (relative to its image root), domain, split ("train",
        "test", or "" where nothing is split), label (missing where not given), height and width (int64 pixels of the
        EXIF-oriented original), box_x0 .. box_y1 (float64 pixels, NaN: none), sha256, duplicate_of (image_id of the
        first image with the same bytes, or ""). A file name that is no UTF-8 is held as Python opens it: such a table
        cannot be written as Parquet. ``live`` adds the column addition (int64, the number of the `grappa add` that
        brought the image; 0: an image of the run).
        """
        from grappa.images.table import image_file

        table = self._image_table()
        check_same_origin(self._folder, "images", "sources")
        manifest = readable_manifest(self._folder, "sources")
        assert manifest is not None, "the images were listed before they were decoded"
        roots = manifest.provenance["roots"]
        files = [image_file(roots[root], path) for root, path in zip(table["root"], table["path"], strict=True)]
        table.insert(0, "file", pd.Series(files, index=table.index, dtype=object))  # a path need not be UTF-8
        table.insert(list(table.columns).index("split") + 1, "label", self._labels())
        table = live_images(self._folder, self.config, table) if live else table
        return _categorical(table.drop(columns="root"), "domain", "split", "label")

    def rejected(self) -> pd.DataFrame:
        """Return the files that could not be used: path, root (number of the image root), domain, reason."""
        return _categorical(self._read("images", "rejected.parquet"), "domain")

    def objects(self) -> pd.DataFrame:
        """Return the objects' boxes: index image_id.

        Columns: path, domain, split, box_x0 .. box_y1 (float64 pixels of the original, NaN: none), confidence (0-1),
        provider, accepted (bool), reason (why a box was refused, or "").
        """
        check_same_origin(self._folder, "images", "objects")
        boxes = self._read("objects", "objects.parquet").set_index("image_id")
        table = self._image_table()[["path", "domain", "split"]].join(boxes, validate="one_to_one")
        return _categorical(table, "domain", "split", "provider", "reason")

    # ---------------------------------------------------------------- clusters

    def assignments(self, *, live: bool = False) -> pd.DataFrame:
        """Return the cluster of each image at each granularity: index image_id.

        Columns: path, domain, split, label, and for each granularity ``k00256`` (int64, the pseudo-label) and
        ``k00256_distance`` (float32, 1 - cosine to the cluster's centroid, 0 to 2). Where its clusters were named,
        merged or split in `grappa explore`, also ``k00256_group`` (int64, the number of the cluster after merging and
        splitting) and ``k00256_name`` (its name, or ""). Edits of clusters that were made again since are left out,
        with a UserWarning.
        """
        names = self.config.granularities
        table = self._image_table()[["path", "domain", "split"]]
        check_same_origin(self._folder, "images", *(f"clusters/{name}" for name in names))
        table["label"] = self._labels()
        for name in names:
            cluster = self._read(f"clusters/{name}", "assignments.parquet").set_index("image_id")
            table[name], table[f"{name}_distance"] = cluster["pseudo_label"], cluster["distance"]
        table = live_assignments(self._folder, self.config, table) if live else table
        named = self._add_groups(table)
        return _categorical(table, "domain", "split", "label", *named)

    def cluster_sizes(self) -> pd.DataFrame:
        """Return a row for each cluster, empty ones too: granularity, pseudo_label, num_train, num_images (int64)."""
        table, parts = self.assignments(), []
        for name in self._granularities():
            everyone = pd.RangeIndex(num_clusters_of(name))
            counts = table[name].value_counts().reindex(everyone, fill_value=0)
            train = table.loc[table["split"] != "test", name].value_counts().reindex(everyone, fill_value=0)
            part = {"granularity": name, "pseudo_label": everyone, "num_train": train.array, "num_images": counts.array}
            parts.append(pd.DataFrame(part))
        return _categorical(pd.concat(parts, ignore_index=True), "granularity")

    def domain_mix(self) -> pd.DataFrame:
        """Return each domain's share of each cluster: granularity, pseudo_label, domain, num_images, share (0 to 1)."""
        table, parts = self.assignments(), []
        for name in self._granularities():
            counts = table.groupby([name, "domain"], observed=True).size().rename("num_images").reset_index()
            counts = counts.rename(columns={name: "pseudo_label"})
            counts["share"] = counts["num_images"] / counts.groupby("pseudo_label")["num_images"].transform("sum")
            counts.insert(0, "granularity", name)
            parts.append(counts)
        return _categorical(pd.concat(parts, ignore_index=True), "granularity", "domain")

    def cluster_metrics(self) -> pd.DataFrame:
        """Return how well the clusters agree with the labels of the train images: granularity, domain, metrics.

        Columns: num_images (labelled train images), num_clusters (those that hold one of them), purity (0 to 1), nmi (0
        to 1), ami (at most 1, about 0 by chance), NaN where no image has a label; the domain ``_mean`` is the mean over
        domains. ``grappa.metrics.clustering.cluster_metrics`` defines them. Only the ami compares granularities: purity
        and nmi grow with the number of clusters.
        """
        self._granularities()
        file = self._published("evaluation") / "clusters.csv"
        if not file.is_file():
            command = f"grappa run {quoted(self.root)} --until evaluation"
            raise ValueError(f"{file} is missing: an older version made the evaluation; run `{command}`")
        return _categorical(read_metrics(file), *NAMES)

    def centroids(self, granularity: str) -> NDArray[np.float32]:
        """Return the L2-normalised centroids (k, D) of a granularity such as ``k00256``; row c is pseudo-label c.

        They lie in the space that was clustered: that of ``whitening/features/features.npy``, unless
        ``features.whitening_power`` is 0, or other features were clustered (``clusters.view``,
        ``clusters.embeddings``).
        """
        import numpy as np

        names = self._granularities()
        if granularity not in names:
            raise ValueError(f"there is no granularity {granularity!r}; the run has {', '.join(names)}")
        return np.load(
            self._published(f"clusters/{granularity}", "centroids.npy") / "centroids.npy", allow_pickle=False
        )

    # ---------------------------------------------------------------- training and results

    def learning_curves(self) -> pd.DataFrame:
        """Return the metrics along training: stage, instance, step, epoch, learning_rate, loss, others by stage."""
        parts, config = [], self.config
        for stage in ("adaptors", "fusion", "student"):
            for instance in find_stage(stage).instances(config):
                lines = (self._published(Node(stage, instance).name) / "metrics.jsonl").read_text().splitlines()
                part = pd.DataFrame([json.loads(line) for line in lines])
                part.insert(0, "stage", stage)
                part.insert(1, "instance", instance or stage)
                parts.append(part)
        return _categorical(pd.concat(parts, ignore_index=True), "stage", "instance")

    def verdict(self) -> Verdict:
        """Return whether adaptation helped, told without labels.

        Its attributes: verdict ("helped", "no certain difference", "hurt", "too few images"), evidence (two sentences),
        sentence (both in one line), choice (the model that was chosen), images ("test" or "train") and num_images (on
        which it rests), models. ``pandas.DataFrame(run.verdict().models)`` is a row for each compared model: model,
        indicator (its neighbourhood standout, higher is better), difference (to the frozen backbone with its head),
        low, high (the 95 % interval of the difference), low_within (its lower end among the images of an image's own
        domain; None where there is one domain, or in an older verdict).
        """
        self._published(VERDICT.name)
        found = read_verdict(self._folder)
        assert found is not None, "it was published"
        return found

    def metrics(self) -> pd.DataFrame:
        """Return the result table: model, domain (``_mean``: over all domains), gallery (domain | merged), metrics."""
        return _categorical(read_metrics(self._published("evaluation", "metrics.csv") / "metrics.csv"), *NAMES)

    def per_query(self) -> pd.DataFrame:
        """Return the metrics of every query: image_id, domain, model, gallery, num_positives, average_precision, ..."""
        table = self._read("evaluation", "per_query.parquet")
        return _categorical(table, *NAMES)

    def jobs(self) -> pd.DataFrame:
        """Return the jobs of a run, a row for each artifact of each job, in the order of submission.

        Columns: artifact, job_id, job_name, state (submitted, running, stopped, made, failed, not begun: from the job's
        own events), submitted, started, ended (UTC), seconds, restarts, node, peak_memory_bytes (of the first
        process), exit, recipe (sha256 of the artifact's fingerprint), error, outcome (the state in Slurm's accounting
        of a job that ended without an event), log.
        """
        path = self.root / "jobs" / "jobs.csv"
        if not path.is_file():
            raise ValueError(f"{path} is missing: no job was submitted; do it by `grappa submit {quoted(self.root)}`")
        texts = dict.fromkeys(("job_id", "recipe", "error", "outcome"), "string")
        numbers = dict.fromkeys(("restarts", "peak_memory_bytes", "exit"), "Int64")
        dates = ["submitted", "started", "ended"]
        try:
            table = pd.read_csv(path, dtype={**texts, **numbers}, parse_dates=dates)
        except ValueError as error:
            command = f"grappa status {quoted(self.root)}"
            raise ValueError(f"{path} is damaged ({error}); write it again by `{command}`") from error
        return _categorical(with_unguarded(table, ["error", "log"]), "state", "node")

    # ---------------------------------------------------------------- attention

    def attention(self, *, rows: Which = "test", pairs: str = "neighbors") -> pd.DataFrame:
        """Return each domain's mean granularity attention: domain, block (int64), granularity, num_images, mean, std.

        ``rows``: the images over which the mean is taken, by default those that are evaluated. ``pairs``: the fusion,
        neighbors or views. ``std`` is the standard deviation over the domain's images.
        """
        from grappa.metrics.attention import attention_by_domain

        return _categorical(attention_by_domain(*self._attention(rows, pairs)), "domain", "granularity")

    def attention_summary(self, *, rows: Which = "test", pairs: str = "neighbors") -> pd.DataFrame:
        """Return how much the attention differs by image and by domain, a row for each (domain, block).

        The domain ``_mean`` and the block -1 are means over domains and over blocks. Columns: num_images, entropy
        (nats), entropy_share (of log G), variance, domain_variance, eta_squared, image_information, domain_information;
        ``grappa.metrics.attention.summarize_attention`` has their formulas.
        """
        from grappa.metrics.attention import summarize_attention

        attention, domains, _ = self._attention(rows, pairs)
        return _categorical(summarize_attention(attention, domains), "domain")

    # ---------------------------------------------------------------- embeddings

    @property
    def deployed(self) -> str:
        """The model that is exported, indexed and searched, such as ``student``: the given one, or the choice of the
        verdict, without which it is a ValueError."""
        return deployed_in(self._folder, self.config)

    def embeddings(
        self, model: str | None = None, *, head: bool = True, live: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.object_]]:
        """Return the L2-normalised embeddings (N, D) of all images by a model, and their image ids (N,).

        Args:
            model: a model of the result table except the oracle, such as ``zero_shot``, ``k00256`` or ``fused``; None:
                the deployed model.
            head: whether the embedding head is applied, as in the result table; it makes no difference for models
                without a head.
            live: the collection as it is now; added images have embeddings by ``zero_shot`` and the deployed model.

        The array is mapped from the file and read-only: copy it to change it. With ``live`` it is in memory where
        images were added or removed.
        """
        import numpy as np

        node = self._embedded_by(model, head)
        folder = self._published(node.name)
        check_same_origin(self._folder, "images", node.name)
        embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        ids = self._image_table().index.to_numpy(dtype=object)
        return live_embeddings(self._folder, self.config, node, embeddings, ids) if live else (embeddings, ids)

    def neighbors(self, image_id: str, k: int = 10, *, model: str | None = None, live: bool = False) -> pd.DataFrame:
        """Return the ``k`` images nearest to an image of the run, without the image itself, nearest first.

        Index image_id; columns: similarity (cosine, -1 to 1), then those of ``images()``. ``model`` and ``live`` as in
        ``embeddings``; the search is exact. ValueError for an unknown image.
        """
        import numpy as np

        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one image")
        embeddings, ids = self.embeddings(model, live=live)
        (rows,) = np.nonzero(ids == image_id)
        if len(rows) != 1:
            raise ValueError(f"there is no image {image_id!r}; images() lists the ids of the run")
        starts = range(0, len(ids), BLOCK_ROWS)
        query = np.asarray(embeddings[rows[0]])
        similarities = np.concatenate([embeddings[start : start + BLOCK_ROWS] @ query for start in starts])
        nearest = np.argsort(-similarities, kind="stable")
        nearest = nearest[nearest != rows[0]][:k]
        table = self.images(live=live).iloc[nearest]
        table.insert(0, "similarity", similarities[nearest])
        return table

    # ---------------------------------------------------------------- keeping a collection clean

    def duplicates(
        self, *, threshold: float = NEAR_DUPLICATE, model: str | None = "zero_shot", live: bool = False
    ) -> pd.DataFrame:
        """Return the pairs of copies and near-duplicates, exact ones first, then the most similar first.

        Columns: image_id and other_id, similarity (float32 cosine), exact (bool: the same bytes), group (int64: pairs
        with an image in common, directly or not), domain, other_domain, path, other_path. A copy is paired with the
        first image of its bytes only, and compared with no other image. other_id is the earlier of the two in
        ``images()``, so without all of image_id no pair is left, and at least one image of each group.

        Args:
            threshold: the least cosine of a near-duplicate, above 0, at most 1. It depends on the model what a cosine
                means: look at the pairs near the threshold.
            model: whose embeddings are compared, as in ``embeddings``; the frozen backbone tells single pictures
                apart, an adapted model is made to bring the pictures of one kind together. None: the deployed model.
            live: the collection as it is now.

        ValueError where more than ten million pairs reach the threshold.
        """
        from grappa.pipeline.engine.live.curation import duplicate_pairs

        embeddings, _ = self.embeddings(model, live=live)
        return _categorical(duplicate_pairs(self.images(live=live), embeddings, threshold), "domain", "other_domain")

    def sample(self, n: int, *, seed: int = 0, rows: Which = "all", live: bool = False) -> pd.DataFrame:
        """Return ``n`` images spread evenly over the clusters of all granularities, the coarsest first: images() rows.

        Each large cluster gives as many images as its size allows, evenly over the small clusters in it; copies are
        left out. The order is that of drawing: the first m rows are the sample of m images. The draws depend on
        ``seed`` and the image ids only. ``rows``: from which images, train, test or all of them; ``live``: of the
        collection as it is now. ValueError where there are fewer than ``n`` different images.
        """
        from grappa.pipeline.engine.live.curation import sampled

        names, images, clusters = self._granularities(), self.images(live=live), self.assignments(live=live)
        clustered = clusters[[*names]].notna().all(axis=1).to_numpy()
        chosen = [row for row in chosen_rows(images, rows) if clustered[row]]
        partitions = [clusters[name].iloc[chosen].to_numpy(dtype="int64") for name in names]
        return sampled(images.iloc[chosen], partitions, n, seed=seed)

    def outliers(self, *, live: bool = False) -> pd.DataFrame:
        """Return the images of the run, those that are farthest from others first: index image_id.

        ``live``: without those that were removed; images that were added are not ranked.

        Columns: distance (float32: mean 1 - cosine to the nearest train images, by the frozen backbone), ratio
        (float32: how much farther that is than these images are from theirs, about 1 for most;
        ``grappa.search.novelty.outlier_ratios``), then those of ``images()``. Sorted by ratio, images on the rim of a
        dense group come first: on photographs these were ordinary, and what is far from all was odd.
        """
        import numpy as np

        from grappa.search.novelty import outlier_ratios

        folder = self._published("neighbors")
        check_same_origin(self._folder, "images", "neighbors")
        distances = 1 - np.load(folder / "similarities.npy", allow_pickle=False)
        ratios = outlier_ratios(np.load(folder / "neighbors.npy", allow_pickle=False), distances)
        table = self.images()
        table.insert(0, "distance", distances.mean(axis=1))
        table.insert(1, "ratio", ratios)
        if live:
            table = table[table.index.isin(self.images(live=True).index)]
        return table.sort_values("distance", ascending=False, kind="stable")

    # ---------------------------------------------------------------- inside

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.open(self.root)

    def _published(self, name: str, *files: str) -> Path:
        """Return the folder of an artifact, after a check of the ``files`` that are to be read (default: all)."""
        folder = self._folder
        artifact = folder.artifact(name)
        missing = readable_manifest(folder, name) is None
        if missing and folder.config_path.exists() and artifact.node not in nodes(self.config):
            setting = ASKING.get(name, "SECTION.KEY=VALUE")
            raise ValueError(
                f"{name} is no part of the run {self.root}: its configuration asks for none; change that by `grappa "
                f"init {quoted(self.root)} --set {setting}`, then `grappa run {quoted(self.root)}` makes it"
            )
        return published(folder, name, *files)

    def _embedded_by(self, model: str | None, head: bool) -> Node:
        """Return the node with the embeddings of a model, None: of the deployed one."""
        sources = evaluated_models(self.config)
        if model is not None and model not in sources:
            raise ValueError(f"there are no embeddings of a model {model!r}; the run has {', '.join(sources)}")
        node = sources[model] if model is not None else final_node(self.config, self.deployed)
        return node if head else Node("embeddings", node.instance)

    def _read(self, name: str, file: str) -> pd.DataFrame:
        return pd.read_parquet(self._published(name, file) / file)

    def _add_groups(self, table: pd.DataFrame) -> list[str]:
        """Add the groups and names of edited clusters to the table of assignments; return the columns of names."""
        from grappa.pipeline.store.edits import EDITS_FILE, passed_over, read_edits

        for name in passed_over(self._folder):
            text = f"what {self.root / EDITS_FILE} says of {name} belongs to clusters that were made again since"
            warnings.warn(f"{text}: it is left out", UserWarning, stacklevel=3)
        edits = {name: each for name, each in read_edits(self._folder).items() if name in table}
        for name, each in edits.items():
            groups = each.groups(table[name].to_numpy(), list(table.index))
            table[f"{name}_group"] = groups
            table[f"{name}_name"] = [each.names.get(int(group), "") for group in groups]
        return [f"{name}_name" for name in edits]

    def _granularities(self) -> tuple[str, ...]:
        names = self.config.granularities
        if not names:
            raise ValueError("the run has no clusters: its adaptors are trained on labels (adaptors.supervision)")
        return names

    def _image_table(self) -> pd.DataFrame:
        return self._read("images", "images.parquet").set_index("image_id")

    def _labels(self) -> pd.Series[str]:
        return self._read("images", "labels.parquet").set_index("image_id")["label"]

    def _attention(self, rows: str, pairs: str) -> tuple[NDArray[np.float32], NDArray[np.object_], list[str]]:
        """Return the attention of the chosen images (n, L, G), their domains (n,) and the granularities' names."""
        import numpy as np

        check_same_origin(self._folder, "images", f"attention/{pairs}")
        folder = self._published(f"attention/{pairs}")
        images = self._read("images", "images.parquet")
        chosen = chosen_rows(images, rows)
        attention = np.load(folder / "attention.npy", mmap_mode="r", allow_pickle=False)
        names = fused_granularities(self._folder, self.config, pairs)
        return attention[chosen], images["domain"].to_numpy()[chosen], list(names)


def read_metrics(path: Path) -> pd.DataFrame:
    """Return a ``metrics.csv`` or ``clusters.csv``; only an empty cell is no number: a domain may be called NA."""
    table = pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])
    return with_unguarded(table, [name for name in NAMES if name in table])


def _categorical(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the table with the named columns, where it has them, as categorical columns.

    Categories are in the order of appearance; those of domain and label are sorted.
    """
    kinds = {name: _categories(name, table[name].dropna().unique()) for name in columns if name in table}
    return table.astype(kinds)


def _categories(name: str, values: Iterable[str]) -> pd.CategoricalDtype:
    return pd.CategoricalDtype(sorted(values) if name in ("domain", "label") else list(values))
