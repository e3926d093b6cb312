"""The published systems that hanse implements, and what of each was shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class System:
    """One published system: where it is, what works, what shows it."""

    slug: str
    name: str
    paper: str
    status: Literal["works", "partly"]
    implemented: str
    shown: str


SYSTEMS = (
    System(
        slug="momentum",
        name="FedAvg, FedProx, FedOpt, SCAFFOLD; FedAvg-M, SCAFFOLD-M and their variance-reduced forms",
        paper="Cheng, Huang, Wu, Yuan, ICLR 2024, arXiv 2306.16504; McMahan et al. 2017; Li et al. 2020; Reddi et al. 2021",
        status="partly",
        implemented="FedAvg, FedProx, FedAdam, FedYogi, FedAdagrad, FedAvgM, Scaffold; FedAvg_M, Scaffold_M, with _VR forms",
        shown="every exact check in tests/methods; on digits FedAvg-M trains below FedAvg, and SCAFFOLD-M below SCAFFOLD, "
        "each at its own rate, but not in half the rounds; not shown at CIFAR-10 size",
    ),
    System(
        slug="fedspeed",
        name="FedSpeed",
        paper="Sun, Shen, Huang, Ding, Tao, ICLR 2023, arXiv 2302.10429",
        status="partly",
        implemented="FedSpeed, both server modes",
        shown="every exact check in tests/methods; on digits more accurate than FedAvg and FedProx; that it loses less from "
        "longer local training was not seen, because FedAvg loses nothing there; not shown at CIFAR-10 size",
    ),
    System(
        slug="fedfix",
        name="FedFix, with FedAsync and FedBuff",
        paper="Fraboni, Vidal, Kameni, Lorenzi, JMLR 24(110), 2023, arXiv 2206.10189; Xie et al. 2019; Nguyen et al. 2022",
        status="partly",
        implemented="the schedules fedfix, fedbuff, fedasync, with staleness weights or measured unbiased ones; the rule FedAsync",
        shown="every exact check in tests/schedules and tests/methods; limits on quadratics; on digits FedFix is below FedAvg at "
        "equal virtual time and steadier than FedAsync; not shown at CIFAR-10 size; FedBuff's wait=True is not there",
    ),
    System(
        slug="fedrdma",
        name="FedRDMA",
        paper="Zhang, Cai, Zhang, Xu, Wang, Zhou, 2024, arXiv 2403.00881",
        status="partly",
        implemented="streams in chunks with credits, repair, resume and digests, over TCP, shared memory and UCX; a time model",
        shown="every exact check in tests/transport and tests/engines; through a proxy of 20 ms 4.8 times as fast "
        "as one chunk at a time, 3.6 times as one message at 3e-7 losses a byte, and rounding hidden behind sending; without "
        "losses no faster than one message; UCX was run over TCP and shared memory only; not shown: RDMA, and with it the 3.8",
    ),
    System(
        slug="fedcompass",
        name="FedCompass",
        paper="Li, Chaturvedi, He, Chen, Singh, Kindratenko, Huerta, Kim, Madduri, ICLR 2024, arXiv 2309.14675",
        status="partly",
        implemented="the schedule fedcompass, for any rule and codec",
        shown="every exact check in tests/schedules; on digits sooner at 90 % than FedAvg with Qmax steps and than FedAsync, and "
        "more accurate at the end; FedAvg with Qmin steps is sooner still; not shown at MNIST and CIFAR-10 size",
    ),
    System(
        slug="fedau",
        name="FedAU, with known participation, MIFA and FedVARP",
        paper="Wang, Ji, ICLR 2024, arXiv 2306.03401; Gu et al. 2021; Jhunjhunwala et al. 2022",
        status="partly",
        implemented="FedAU, AverageAll, KnownParticipation, MIFA, FedVARP; the traces bernoulli, markov and cyclic",
        shown="every exact check in tests/methods; limits on quadratics; on digits more accurate than averaging over participants, "
        "also on rare classes: in three patterns with K = 50, without a cutoff not under cyclic; not shown at CIFAR-10 size",
    ),
    System(
        slug="fedamd",
        name="FedAMD",
        paper="Wu, Guo, Qu, He, Liu, Gao, ICML 2023, arXiv 2206.05891",
        status="partly",
        implemented="FedAMD, with random and sequential anchors",
        shown="every exact check in tests/methods; on digits p = 0 is the worst; FedAMD is faster than FedAvg at its own small "
        "rate, but slower and less steady when each has its own; not shown at Fashion-MNIST size",
    ),
    System(
        slug="modest",
        name="MoDeST",
        paper="de Vos, Dhasade, Kermarrec, Lavoie, Pouwelse, 2023, arXiv 2302.13837",
        status="partly",
        implemented="the schedule modest, for rules whose server remembers nothing; views, pings, joining, leaving, restarts",
        shown="every exact check in tests/schedules; on digits as many rounds as FedAvg and a tenth of D-PSGD's models; training "
        "goes on after 80 % of the nodes have crashed; not shown on the paper's data sets, nor with traces of real devices",
    ),
    System(
        slug="stale-inversion",
        name="Stale-update inversion",
        paper="Wang, Gao, AAAI 2025, arXiv 2309.13536",
        status="partly",
        implemented="StaleInversion, FirstOrder",
        shown="every exact check in tests/methods; on digits the inverted update is 0.001 from the current one by cosine, the raw "
        "one 0.187, and the class that only late clients hold ends at 0.867 against 0.437 (weighted) and 0.387 (direct); "
        "first-order compensation with lam = 4 was no better than raw; not shown at MNIST or CIFAR-10 size",
    ),
    System(
        slug="bcrs-opwa",
        name="BCRS and OPWA",
        paper="Tang, Huang, Yan, Wang, Tang, Shi, Zhou, Chu, ICPP 2024, arXiv 2408.14736",
        status="partly",
        implemented="the codec bcrs, the rule OPWA",
        shown="every exact check in tests/codecs and tests/methods; on digits at CR* = 0.01 accuracy rises from 0.654 (top-k) to "
        "0.775 (BCRS) and 0.796 (with OPWA) in the same virtual time; above FedAvg at CR* = 0.1 only OPWA with top-k; not shown at "
        "CIFAR-10, CIFAR-100 and SVHN size",
    ),
    System(
        slug="anarchic",
        name="Anarchic federated learning",
        paper="Yang, Zhang, Khanduri, Liu, ICML 2022, arXiv 2108.09875",
        status="partly",
        implemented="AFA_CD, AFA_CS; the schedule anarchic",
        shown="every exact check in tests/methods and tests/schedules; limits on quadratics; on digits AFA-CS is within 0.03 of "
        "FedAvg in less virtual time, and above AFA-CD where fast workers hold certain classes, but not where speeds and data are "
        "unrelated; not shown at CIFAR-10 and Shakespeare size",
    ),
    System(
        slug="fedzip",
        name="FedZip",
        paper="Malekijoo, Fadaeieslam, Malekijou, Homayounfar, Alizadeh-Shabdiz, Rawassizadeh, 2021, arXiv 2102.01593",
        status="partly",
        implemented="the codec fedzip, a chain of topk, kmeans and the shortest of huffman, positions and gaps, for any rule",
        shown="exact checks in tests/codecs, of the quantiser's error for k = 3 and doublings of the centres only; on digits 2.1 "
        "points below FedAvg at an update 55 times smaller, 3.3 at 105, and with error feedback 1.5 at 155; more accurate than "
        "top-k in fewer bytes, but not than ternary or top-k with feedback; not shown: the ratio of 1085, which needs a larger "
        "model, the paper's CNN and VGG16, a GPU",
    ),
    System(
        slug="rffl",
        name="RFFL",
        paper="Xu, Lyu, FL-ICML 2021, arXiv 2011.10464",
        status="partly",
        implemented="RFFL, with both readings of the reward; downloads of which each client gets a part",
        shown="every exact check in tests/methods; on digits five kinds of liars are removed in round 10, nobody is less accurate "
        "than alone, and 33 samples give 0.87 to 0.89 instead of 0.46 to 0.59; fairness is 78 to 90, not above 90, and reputations "
        "grow with size in half of the runs only; label flippers stay; not shown at MNIST and CIFAR-10 size",
    ),
    System(
        slug="gossip-variance",
        name="Variance-corrected gossip",
        paper="Tian, Al-Ars, Kitsak, Hofstee, 2024, arXiv 2404.04616",
        status="partly",
        implemented="the merge variance_corrected with its three targets, for the schedules gossip and async_gossip",
        shown="every exact check in tests/aggregators and tests/schedules; on digits, from own starts, 0.910 with the correction "
        "and 0.097 without, in rounds, and 0.904 and 0.103 without rounds; from a common start 0.914 either way; not shown with "
        "LeNet-5 and ResNet-18 on 50 nodes",
    ),
    System(
        slug="dfedsam",
        name="DFedSAM and DFedSAM-MGS, with D-PSGD, DFedAvg and DFedAvgM",
        paper="Shi, Shen, Wei, Sun, Yuan, Wang, Tao, ICML 2023, arXiv 2302.04083; Lian et al. 2017; Sun, Li, Wang 2023",
        status="partly",
        implemented="FedSAM under the schedule gossip, on any topology, with Q exchanges a round",
        shown="every exact check in tests/methods and tests/schedules; on digits four exchanges a round bring the nodes from 0.877 "
        "to 0.941 and the models 12 times closer; DFedSAM is as accurate as DFedAvg and flatter; not shown: a gain in accuracy "
        "from SAM, CIFAR-10 and ResNet-18 on 100 nodes",
    ),
    System(
        slug="frl",
        name="FRL",
        paper="Mozaffari, Shejwalkar, Houmansadr, USENIX Security 2023, arXiv 2110.04350",
        status="partly",
        implemented="FRL, with three readings of what is ranked; the codec ranks",
        shown="every exact check in tests/methods; on digits 20 % liars cost it 1.6 points, and FedAvg everything; without liars "
        "it is a little more than 5 points below FedAvg (3.2 with 512 hidden units), and Multi-Krum and the trimmed mean are above "
        "it with and without liars; at 40 % it falls to 0.44; not shown at MNIST, CIFAR-10 and FEMNIST size; no sparse variant",
    ),
    System(
        slug="bristle",
        name="Bristle",
        paper="Verbraeken, de Vos, Pouwelse, 2021, arXiv 2110.11006",
        status="partly",
        implemented="the rule and the schedule Bristle, with the three prioritisers; numbers of common classes are exact, without "
        "private set intersection",
        shown="every exact check in tests/methods and tests/schedules; on digits with 5 of 15 peers lying, at each rule's best "
        "rate 0.772 (label flip) and 0.807 (noise) against 0.581 and 0.515 for averaging, 0.358 and 0.403 for Krum; without liars "
        "0.826 against 0.854; the trimmed mean comes as near as 0.782 under noise; not shown on MNIST, CIFAR-10 and WISDM",
    ),
    System(
        slug="flag",
        name="Flag Aggregator, with Krum, Multi-Krum, Bulyan, MeaMed, Phocas, medians, trimmed means and centred clipping",
        paper="Almasi, Mishra, Vamanan, Ravi, ICLR 2024, arXiv 2302.05865; Blanchard et al. 2017; El Mhamdi et al. 2018",
        status="partly",
        implemented="the aggregators, for any rule that averages, after nearest-neighbour mixing, bucketing or clipping; attacks",
        shown="every exact check in tests/aggregators, against byzfl where it has the rule; cosines on Gaussian gradients; on "
        "digits never more than 0.3 points below the mean of normalised updates under seven attacks, but below medians under most; "
        "not shown on CIFAR-10 with ResNets",
    ),
    System(
        slug="lifl",
        name="LIFL: event-driven hierarchical aggregation",
        paper="Qi, Ramakrishnan, Lee, MLSys 2024, arXiv 2405.10968",
        status="partly",
        implemented="hanse.hierarchy: partial means, stores in shared memory, BestFit placement, eager aggregators that start on "
        "arrival, are promoted, reused and stopped; nodes are stores on one machine; without eBPF, and for means only",
        shown="exact checks in tests/hierarchy with real processes; BestFit against dealing out in "
        "turn in simulation, eager against lazy, CPU time against TCP; time, CPU and memory beside one aggregator and a process "
        "each by hanse bench aggregation; not shown on several machines",
    ),
    System(
        slug="fedkseed",
        name="FedKSeed and FedKSeed-Pro",
        paper="Qin, Chen, Qian, Ding, Li, Deng, ICML 2024, arXiv 2312.06353",
        status="partly",
        implemented="FedKSeed, with importance for -Pro, on any model",
        shown="exact checks in tests/methods: the rebuilt model is the average of the clients', traffic by formula and below 18 kB "
        "for the paper's settings; accuracy against K and memory not shown yet",
    ),
    System(
        slug="fwdllm",
        name="FwdLLM (FwdFL)",
        paper="Xu, Cai, Wu, Li, Wang, USENIX ATC 2024, arXiv 2308.13894",
        status="partly",
        implemented="FwdLLM: forward gradients, steps by variance, candidates by cosine, gradients or scalars sent",
        shown="exact checks in tests/methods, none of which differentiates anything; accuracy and memory not shown yet",
    ),
)
